"""Products of one stage, kept for the stage behind it, which multiplies many of the same numbers by the same weights.

A pass that keeps the numbers leaves most products of a stage what they were, bit for bit; to compute them again is most
of what running the next stage costs. Nothing is presumed of the pass: that input, weight and bias are the same is seen in
their values, each time.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MOST_BYTES = 192 << 20
"""Of the inputs and results that are kept of a stage: 200 tokens of a model of 100 M parameters."""

_linear = torch.ops.aten.linear.default


@dataclass(frozen=True)
class _Product:
    """A product that was computed.

    Attributes:
        versions: how often input and result had been written into.
    """

    x: Tensor
    result: Tensor
    versions: tuple[int, int]

    @classmethod
    def of(cls, x: Tensor, result: Tensor) -> _Product:
        return cls(x, result, (x._version, result._version))

    def gives(self, x: Tensor) -> bool:
        """Whether it is that of this input, bit for bit, and nobody wrote into what is kept since."""
        return (
            self.versions == (self.x._version, self.result._version)
            and self.x.shape == x.shape
            and torch.equal(_bits(self.x), _bits(x))
        )


class KnownProducts:
    """The products of the stage before and of this one."""

    def __init__(self, most: int = MOST_BYTES) -> None:
        self._most, self._bytes = most, 0
        self._before: dict[bytes, list[_Product]] = {}
        self._now: dict[bytes, list[_Product]] = {}

    def linear(self, x: Tensor, mark: bytes, compute: Callable[[], Tensor]) -> Tensor:
        """The product of x [..., K] and what `mark` was made of, as `compute` gives it or gave it for the same numbers."""
        before = self._before.get(mark, [])
        place = next((place for place, item in enumerate(before) if item.gives(x)), None)
        # Each is given once: two calls with one tensor between them would see what the other's readers write into it.
        found = _Product.of(x, compute()) if place is None else before.pop(place)
        size = x.nbytes + found.result.nbytes
        if self._bytes + size <= self._most:
            self._bytes += size
            self._now.setdefault(mark, []).append(found)
        return found.result

    def next_stage(self) -> None:
        """Forget the stage before; what was kept since is that of the stage before now."""
        self._before, self._now, self._bytes = self._now, {}, 0


class MarkedWeights:
    """Marks of the weights of one run of a stage; none of them is written into while it runs.

    A weight is known by its products with a row of random numbers, which tell where its numbers are, and by the sum of its
    bits, which one number that changes always changes, however little. Both cost about a row more of the call.
    """

    def __init__(self, products: KnownProducts | None) -> None:
        self._products = products
        self._marks: dict[tuple[int, int], tuple[list[weakref.ref[Tensor]], bytes]] = {}

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`aten.linear`: x [..., K], weight [N, K], bias [N] -> [..., N]."""
        compute: Callable[[], Tensor] = functools.partial(_linear, x, weight, bias)
        parts = [part for part in (weight, bias) if part is not None]
        if self._products is None or not all(map(_is_plain, (x, *parts))):
            return compute()
        return self._products.linear(x, self._mark(parts), compute)

    def _mark(self, parts: Sequence[Tensor]) -> bytes:
        """Of a weight, and its bias where it has one. Nothing is kept alive for it: a weight of codes may be made anew."""
        place = id(parts[0]), id(parts[-1])
        known, mark = self._marks.get(place, ([], b""))
        if len(known) != len(parts) or any(ref() is not part for ref, part in zip(known, parts, strict=True)):
            weight, *bias = (part.detach() for part in parts)
            rows = (weight @ _random_row(weight.shape[1]), *bias)
            mark = repr([*weight.shape, _sum_of_bits(weight)]).encode() + b"".join(
                row.numpy().tobytes() for row in rows
            )
            self._marks[place] = [weakref.ref(part) for part in parts], mark
        return mark


def _is_plain(tensor: Tensor) -> bool:
    """Float32 in this process's memory: narrower types have too few bits for marks, other devices wait for answers."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.dtype == torch.float32
        and tensor.device.type == "cpu"
        and tensor.is_contiguous()
        and not tensor.is_inference()
    )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().view(torch.int32)


def _sum_of_bits(tensor: Tensor) -> int:
    """Of its words, modulo 2^64; two at a time where they lie so."""
    words = _bits(tensor).flatten()
    pairs = words.numel() % 2 == 0 and words.storage_offset() % 2 == 0
    return int((words.view(torch.int64) if pairs else words).sum(dtype=torch.int64))


@functools.lru_cache(maxsize=64)
def _random_row(size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(size))
