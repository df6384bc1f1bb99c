"""Weights that a stage makes of codes, kept between its calls and for the stages behind it.

The stages of a compile are run again and again, some of them in several calls, over the same codes. What `dequantize`
and its kin make of them is the same each time, and to make it costs more than the products of a short call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from optc.compiler.ir.lazy_weights import LazyWeight
from optc.compiler.ir.row_blocks import row_blocks

MOST_BYTES = 512 << 20
"""Of all weights that are kept: those of a model whose own are held in memory (see `capture/loading`), in float32."""

_Key = tuple[Any, ...]


class MadeWeights:
    """Dense weights by the call that made them and the memory of its codes, which stays alive as long.

    Codes do not change while they are kept: passes make new ones.
    """

    def __init__(self, most: int = MOST_BYTES) -> None:
        self._most, self._bytes = most, 0
        self._kept: dict[_Key, tuple[Tensor, Sequence[Any]]] = {}
        self._used: set[_Key] = set()

    def get(self, op: object, parts: Sequence[Any], keywords: Mapping[str, Any], make: Callable[[], Tensor]) -> Tensor:
        """What was made before of the same codes by the same call, or what `make` gives now.

        Args:
            parts: the tensors that the weight is made of, None where one is left out.
        """
        if any(
            isinstance(part, LazyWeight) for part in parts
        ):  # in files: all of them are more than memory should hold
            return make()
        key = (op, *map(_identity, parts), *sorted(keywords.items()))
        if key not in self._kept:
            made = make()
            size = made.nbytes
            if not self._make_room(size):
                return made
            self._kept[key] = (made, tuple(parts))
            self._bytes += size
        self._used.add(key)
        return self._kept[key][0]

    def _make_room(self, size: int) -> bool:
        """Whether so many bytes more may be kept, where need be in place of the oldest that this stage has not asked for
        yet: a stage whose weights are others would keep none beside those of the stage before."""
        if self._bytes + size > self._most:
            for key in [key for key in self._kept if key not in self._used]:
                self._bytes -= self._kept.pop(key)[0].nbytes
                if self._bytes + size <= self._most:
                    break
        return self._bytes + size <= self._most

    def forget_unused(self) -> None:
        """Let go of what was not asked for since the last time."""
        self._kept = {key: value for key, value in self._kept.items() if key in self._used}
        self._bytes = sum(made.nbytes for made, _ in self._kept.values())
        self._used.clear()


def made_by_rows(op: Callable[..., Tensor], parts: Sequence[Any], keywords: Mapping[str, Any]) -> Tensor:
    """A weight [N, K] made of codes and what belongs to them, a block of rows at a time where each row has its own."""
    codes = parts[0]
    given = [part for part in parts if isinstance(part, Tensor)]
    apart = all(part.dim() > 1 and part.shape[0] == codes.shape[0] for part in given)
    blocks = row_blocks(len(codes), codes[0].numel()) if apart and codes.device.type == "cpu" else []
    if len(blocks) < 2 or any(isinstance(part, LazyWeight) for part in given):
        return op(*parts, **keywords)
    made: Tensor | None = None
    for begin, end in blocks:
        rows = op(*(part[begin:end] if isinstance(part, Tensor) else part for part in parts), **keywords)
        if made is None:
            made = rows.new_empty((codes.shape[0], *rows.shape[1:]))
        made[begin:end] = rows
    assert made is not None
    return made


def _identity(part: Any) -> object:
    """What tells a tensor from another that is alive: its place in a storage. Not every device has addresses of data."""
    if not isinstance(part, Tensor):
        return part
    place = part.untyped_storage()._cdata, part.storage_offset()
    return part.device, place, part.dtype, tuple(part.shape), part.stride()
