"""Selections of rows by what the data say, computed for all rows instead.

`x[mask]`, a loop over the experts that were hit, pieces of as many rows as were counted: such code makes tensors whose
sizes depend on data, which is no graph for engines with fixed shapes. Where what is done with the selected rows treats
each by itself, and the result is written back to where they came from, all rows can be computed and the others be left
out when it is written. Whether that is so is not asked here: what was captured is held to the model's own forward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from optc.compiler import compat


class _Number(int):
    """One of the places that `nonzero` finds: a number where models expect a tensor of one element."""

    def item(self) -> int:
        """The number."""
        return int(self)

    def __getitem__(self, index: object) -> _Number:
        return self


class _WholeSelections(TorchFunctionMode):
    """Answers selections for one forward."""

    def __init__(self) -> None:
        super().__init__()
        self._chosen: dict[int, tuple[Tensor, Tensor]] = {}  # id of an index of rows -> the index, which rows count
        self._counts: set[int] = set()
        self._kept: list[Tensor] = []  # so that ids stay theirs
        self._pieces: tuple[int, int, list[Tensor]] | None = None  # axis, rows, which rows belong to each piece

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        own = _OWN.get(func)
        found = own(self, *args, **(kwargs or {})) if own is not None else NotImplemented
        return func(*args, **(kwargs or {})) if found is NotImplemented else found

    def get(self, x: Tensor, index: Any) -> Any:
        """x[mask]: all rows. x[place]: where there are fewer rows than places, those behind are never selected."""
        if isinstance(index, _Number):
            return x[min(int(index), int(x.shape[0]) - 1)]
        mask = _mask(index)
        return NotImplemented if mask is None else x.flatten(0, mask.dim() - 1).clone()

    def put(self, x: Tensor, index: Any, value: Any) -> Any:
        """x[mask] = rows: those of all of them that count."""
        mask = _mask(index)
        if mask is None or not isinstance(value, Tensor) or value.dim() == 0:
            return NotImplemented
        keep = mask.reshape(*mask.shape, *(1,) * (x.dim() - mask.dim()))
        x.copy_(torch.where(keep, value.reshape(x.shape).to(x.dtype), x))
        return None

    def masked_scatter(self, x: Tensor, mask: Tensor, source: Tensor) -> Any:
        """Of all rows those that count."""
        if str(source.numel()) != str(x.numel()):
            return NotImplemented
        return torch.where(mask, source.reshape(x.shape), x)

    def nonzero(self, x: Tensor, *, as_tuple: bool = False) -> Any:
        """Of a vector of fixed size: every place."""
        if as_tuple or x.dim() != 1 or not isinstance(x.shape[0], int):
            return NotImplemented
        return [_Number(place) for place in range(x.shape[0])]

    def where(self, condition: Tensor, *rest: Any, **named: Any) -> Any:
        """Places of a matrix: all of them, which are remembered."""
        if rest or named or condition.dim() != 2:
            return NotImplemented
        first, second = (torch.arange(size, device=condition.device) for size in condition.shape)
        rows = first[:, None].expand(condition.shape).reshape(-1)
        columns = second[None].expand(condition.shape).reshape(-1)
        for index in (rows, columns):
            self._chosen[id(index)] = (index, condition.reshape(-1) != 0)
        return rows, columns

    def index_add_(self, x: Tensor, axis: int, index: Tensor, source: Tensor, **named: Any) -> Any:
        """Adds the rows that count."""
        if id(index) not in self._chosen or axis != 0:
            return NotImplemented
        _, counts = self._chosen[id(index)]
        return x.index_add_(0, index, torch.where(counts.reshape(-1, *(1,) * (source.dim() - 1)), source, 0.0), **named)

    def counts(self, x: Tensor, own: Callable[[Tensor], Any]) -> Any:
        """x.tolist(): counts stay a tensor."""
        if x.dim() != 1 or x.is_floating_point():
            return own(x)
        self._counts.add(id(x))
        self._kept.append(x)
        return x

    def split(self, x: Tensor, sizes: Any, dim: int = 0) -> Any:
        """Pieces of counted sizes: all rows for each."""
        if not isinstance(sizes, Tensor) or id(sizes) not in self._counts:
            return NotImplemented
        ends = sizes.cumsum(0)
        rows = torch.arange(x.shape[dim], device=x.device)
        belongs = [(rows >= ends[i] - sizes[i]) & (rows < ends[i]) for i in range(sizes.shape[0])]
        self._pieces = (dim, len(belongs), belongs)
        return [x] * len(belongs)

    def cat(self, tensors: Any, dim: int = 0) -> Any:
        """The pieces that were split last: of each its own rows."""
        if self._pieces is None or (dim, len(tensors)) != self._pieces[:2]:
            return NotImplemented
        (_, _, belongs), self._pieces = self._pieces, None
        out = torch.zeros_like(tensors[0])
        for rows, piece in zip(belongs, tensors, strict=True):
            shape = [1] * piece.dim()
            shape[dim] = -1
            out = torch.where(rows.reshape(shape), piece, out)
        return out


def _mask(index: Any) -> Tensor | None:
    found = index[0] if isinstance(index, tuple) and len(index) == 1 else index
    return found if isinstance(found, Tensor) and found.dtype == torch.bool and found.dim() > 0 else None


_OWN: dict[Any, Callable[..., Any]] = {
    Tensor.__getitem__: _WholeSelections.get,
    Tensor.__setitem__: _WholeSelections.put,
    Tensor.masked_scatter: _WholeSelections.masked_scatter,
    Tensor.nonzero: _WholeSelections.nonzero,
    torch.nonzero: _WholeSelections.nonzero,
    torch.where: _WholeSelections.where,
    Tensor.index_add_: _WholeSelections.index_add_,
    Tensor.split: _WholeSelections.split,
    torch.split: _WholeSelections.split,
    torch.cat: _WholeSelections.cat,
}


@contextmanager
def whole_selections(model: torch.nn.Module) -> Iterator[None]:
    """Let a model's forward compute all rows where it selects some."""
    own = model.forward

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with _WholeSelections() as mode, compat.listing_fake_tensors(mode.counts):
            return own(*args, **kwargs)

    model.forward = forward
    try:
        yield
    finally:
        del model.forward
