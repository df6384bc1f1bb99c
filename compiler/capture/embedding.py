"""What makes embeddings of hidden states: pooling, Dense modules, lengths of 1 (Reimers and Gurevych, 2019).

The sums are those of sentence-transformers; of one sequence without padding they are written out once more, plainly, for
the proof of a capture and as a reference.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from optc.compiler.capture.facts import text_config
from optc.compiler.capture.loading import load_model
from optc.compiler.diagnostics import InputError
from optc.compiler.ir.contract import EmbeddingFacts
from optc.compiler.model_folder.checkpoint import CheckpointInfo
from optc.compiler.model_folder.dtypes import DTYPES
from optc.compiler.model_folder.sentence import MODULES, Dense, Normalize, Pooling, SentenceModules, with_modules

_LEAST_WEIGHT, _LEAST_LENGTH = 1e-9, 1e-12  # sentence-transformers' and torch's


class Pool(nn.Module):
    """Hidden states [B, S, C] with their mask [B, S] to [B, C] for each way of pooling, side by side.

    Padding may stand on either side. Sums are made in float32.
    """

    def __init__(self, modes: tuple[str, ...]) -> None:
        super().__init__()
        self.modes = modes

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        weights = mask.to(hidden.dtype)
        found = [_POOLED[mode](hidden, weights) for mode in self.modes]
        return found[0] if len(found) == 1 else torch.cat(found, -1)

    def of_sequence(self, tokens: Tensor) -> Tensor:
        """The same of one sequence [S, C]."""
        return torch.cat([_OF_SEQUENCE[mode](tokens) for mode in self.modes])


def _mean(hidden: Tensor, weights: Tensor) -> Tensor:
    return _total(hidden, weights) / _count(weights)


def _mean_sqrt(hidden: Tensor, weights: Tensor) -> Tensor:
    return _total(hidden, weights) / _count(weights).sqrt()


def _weighted_mean(hidden: Tensor, weights: Tensor) -> Tensor:
    """The k-th token of a sequence counts k times."""
    return _mean(hidden, weights * weights.cumsum(1))


def _total(hidden: Tensor, weights: Tensor) -> Tensor:
    return (hidden * weights[..., None]).sum(1)


def _count(weights: Tensor) -> Tensor:
    return weights.sum(1, keepdim=True).clamp(min=_LEAST_WEIGHT)


def _max(hidden: Tensor, weights: Tensor) -> Tensor:
    return hidden.masked_fill(weights[..., None] == 0, -torch.inf).amax(1)


def _first(hidden: Tensor, weights: Tensor) -> Tensor:
    return _at(hidden, weights.argmax(1))


def _last(hidden: Tensor, weights: Tensor) -> Tensor:
    places = torch.arange(1, hidden.shape[1] + 1, device=hidden.device, dtype=hidden.dtype)
    return _at(hidden, (weights * places).argmax(1))


def _at(hidden: Tensor, index: Tensor) -> Tensor:
    """The token of each row, [B, C], at its index [B]."""
    return hidden.gather(1, index[:, None, None].expand(-1, 1, hidden.shape[2]))[:, 0]


_POOLED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cls": _first,
    "max": _max,
    "mean": _mean,
    "mean_sqrt_len_tokens": _mean_sqrt,
    "weightedmean": _weighted_mean,
    "lasttoken": _last,
}


def _ramp(tokens: Tensor) -> Tensor:
    ramp = torch.arange(1, len(tokens) + 1, device=tokens.device).to(tokens.dtype)
    return ramp / ramp.sum()


_OF_SEQUENCE: dict[str, Callable[[Tensor], Tensor]] = {
    "cls": lambda tokens: tokens[0],
    "max": lambda tokens: tokens.max(0).values,
    "mean": lambda tokens: tokens.mean(0),
    "mean_sqrt_len_tokens": lambda tokens: tokens.sum(0) / len(tokens) ** 0.5,
    "weightedmean": lambda tokens: _ramp(tokens) @ tokens,
    "lasttoken": lambda tokens: tokens[-1],
}


class Projection(nn.Module):
    """A Dense module: [B, K] to [B, N] float32; the product in the type of its weight."""

    def __init__(self, step: Dense, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = nn.Linear(step.weight.shape[1], step.weight.shape[0], bias=step.bias is not None, device="meta")
        self.linear.weight = nn.Parameter(step.weight.to(dtype), requires_grad=False)
        if step.bias is not None:
            self.linear.bias = nn.Parameter(step.bias.to(dtype), requires_grad=False)
        self.activation = getattr(nn, step.activation)()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.activation(self.linear(_cast(x, self.linear.weight.dtype)))
        return _cast(found, torch.float32)

    def of_sequence(self, vector: Tensor) -> Tensor:
        """The same of one vector [K], in its own type."""
        found = self.linear.weight.to(vector.dtype) @ vector
        found = found if self.linear.bias is None else found + self.linear.bias.to(vector.dtype)
        result: Tensor = self.activation(found)
        return result


class Unit(nn.Module):
    """Vectors [B, N] to length 1."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1, eps=_LEAST_LENGTH)

    @staticmethod
    def of_sequence(vector: Tensor) -> Tensor:
        """The same of one vector [N]."""
        return vector / vector.square().sum().sqrt().clamp(min=_LEAST_LENGTH)


class EmbeddingHead(nn.Module):
    """Pooling and what stands behind it: hidden states [B, S, C] and their mask [B, S] to float32 [B, size].

    Args:
        dtype: of the weights.
    """

    def __init__(self, modules: SentenceModules, dtype: torch.dtype) -> None:
        super().__init__()
        self.described = modules
        self.steps = nn.ModuleList(_made(step, dtype) for step in modules.steps)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        pool, *others = self.steps
        found: Tensor = pool(_cast(hidden, torch.float32), mask)
        for step in others:
            found = step(found)
        return found

    def of_sequence(self, tokens: Tensor) -> Tensor:
        """The embedding [size] of one sequence of hidden states [S, C], in float32 at least."""
        found: Any = tokens.float() if tokens.dtype.itemsize < 4 else tokens
        for step in self.steps:
            found = step.of_sequence(found)  # type: ignore[operator]
        result: Tensor = found
        return result

    def facts(self, size: int) -> EmbeddingFacts:
        """Of embeddings of that size."""
        return self.described.facts(size)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A cast to the type that is there already would be a call of the program."""
    return x if x.dtype == dtype else x.to(dtype)


def _made(step: Pooling | Dense | Normalize, dtype: torch.dtype) -> nn.Module:
    if isinstance(step, Pooling):
        return Pool(step.modes)
    return Projection(step, dtype) if isinstance(step, Dense) else Unit()


def load_embedder(
    folder: Path,
    modules: SentenceModules,
    *,
    dtype: str = "fp32",
    trust_remote_code: bool | None = None,
    resident_bytes: int | None = None,
) -> tuple[nn.Module, EmbeddingHead, CheckpointInfo]:
    """The model of a folder, without heads of its own, and what makes embeddings of its hidden states.

    Raises:
        InputError, CaptureError: see `load_model`; a Dense module that does not fit what stands before it.
    """
    model, info = load_model(
        folder,
        dtype=DTYPES[dtype],
        trust_remote_code=trust_remote_code,
        resident_bytes=resident_bytes,
        bare=True,
    )
    _check_widths(modules, getattr(text_config(model.config), "hidden_size", 0), folder)
    return model, EmbeddingHead(modules, DTYPES[dtype]).eval(), with_modules(info, modules)


def _check_widths(modules: SentenceModules, width: int, folder: Path) -> None:
    """Hold each Dense module to what stands before it; `width` is that of hidden states, 0 where it is not known."""
    for step in modules.steps:
        if isinstance(step, Pooling):
            width *= len(step.modes)
        elif isinstance(step, Dense):
            rows, columns = step.weight.shape
            if width and columns != width:
                raise InputError(
                    f"a Dense module reads vectors of {columns}, and gets ones of {width}",
                    where=str(folder / MODULES),
                    remedy="check that the modules and the model belong together",
                )
            width = rows
