"""Rows of one output of a run in float64, as comparisons with other runs need them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from optc.compiler.execution.stage_driver import OutputRole, StageRun

_T = TypeVar("_T")


class Seen:
    """What was found out about some rows of an output: kept with its run, which is compared with several others."""

    def __init__(self, run: StageRun | None = None, *place: Any) -> None:
        """`place`: which rows of it, and as what they are seen."""
        self._seen: dict[Any, Any] = {} if run is None else run.seen
        self._place = place

    def get(self, what: str, compute: Callable[[], _T]) -> _T:
        key = what, *self._place
        if key not in self._seen:
            self._seen[key] = compute()
        found: _T = self._seen[key]
        return found


class WideRows:
    """What comparisons of the rows [n, classes] of one tensor need of it in float64, computed when it is asked for."""

    def __init__(self, tensor: Tensor, role: OutputRole, seen: Seen) -> None:
        self.rows, self._centred, self.seen = tensor, role == "logits", seen

    @functools.cached_property
    def values(self) -> Tensor:
        """In memory of its own; of logits over a vocabulary each row less its mean, which a softmax does not see."""
        wide = plain(self.rows).flatten(0, -2).to(torch.float64, copy=True)
        return wide.sub_(wide.mean(-1, keepdim=True)) if self._centred else wide

    @property
    def square(self) -> float:
        """The squared norm of all values."""
        return self.seen.get("square", lambda: float(self.values.square().sum()))

    @property
    def norms(self) -> Tensor:
        """Of each row of the values."""
        return self.seen.get("norms", lambda: self.values.norm(dim=-1))

    @functools.cached_property
    def log_probabilities(self) -> Tensor:
        return plain(self.rows).flatten(0, -2).double().log_softmax(-1)

    @functools.cached_property
    def probabilities(self) -> Tensor:
        return self.log_probabilities.exp()

    @property
    def entropy(self) -> Tensor:
        """Of each row, in nats."""
        return self.seen.get("entropy", lambda: -self._expected(self.log_probabilities * self.probabilities))

    def divergence(self, other: WideRows) -> Tensor:
        """KL(self || other) of each row, in nats."""
        return self._expected((self.log_probabilities - other.log_probabilities).mul_(self.probabilities))

    def _expected(self, weighed: Tensor) -> Tensor:
        """The sum of each row, in which classes that are ruled out (a logit of minus infinity) say nothing: 0 log 0 is 0."""
        total = weighed.sum(-1)
        if torch.isfinite(total).all():
            return total
        return weighed.masked_fill_(self.log_probabilities == -math.inf, 0.0).sum(-1)

    @property
    def lead(self) -> Tensor:
        """Of the most likely class of each row over its second, the logarithm of their ratio."""
        return self.seen.get("lead", self._lead)

    def _lead(self) -> Tensor:
        first = plain(self.rows).flatten(0, -2).topk(2, -1).values.double()
        return first[..., 0] - first[..., 1]

    @property
    def top(self) -> Tensor:
        """The most likely class of each row."""
        return self.seen.get("top", lambda: plain(self.rows).flatten(0, -2).argmax(-1))

    @property
    def magnitude(self) -> float:
        """The largest of all numbers."""
        return self.seen.get("magnitude", lambda: float(plain(self.rows).nan_to_num().abs().max()))


def plain(tensor: Tensor) -> Tensor:
    """As real numbers, fp32 at least, with a last axis; integers in float64, which has them up to 2^53."""
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    narrow = real.is_floating_point() and real.dtype != torch.float64
    return torch.atleast_1d(real.float() if narrow else real.double())
