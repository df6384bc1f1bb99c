"""Calls of paged attention on ragged requests, for the kernels of every device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import optc.compiler.ops  # noqa: F401  (registers the dialect)
from optc.compiler.ops.library import reference


@dataclass
class Case:
    """Ragged requests over shuffled blocks. Slots without a token hold NaN, unused table entries nonsense."""

    new: tuple[int, ...] = (1, 37, 1, 5)
    past: tuple[int, ...] = (200, 0, 3, 64)
    heads: int = 4
    kv_heads: int = 2
    width: int = 16
    value_width: int = 16
    block_size: int = 4
    window: int = 0
    softcap: float = 0.0
    dtype: torch.dtype = torch.float32

    def inputs(self) -> tuple[list[Tensor], dict[str, float]]:
        generator = torch.Generator().manual_seed(7)
        totals = [a + b for a, b in zip(self.new, self.past, strict=True)]
        needed = [-(-n // self.block_size) for n in totals]
        order = torch.randperm(sum(needed) + 2, generator=generator).int()
        tables = torch.full((len(totals), max(needed)), -9, dtype=torch.int32)
        slots, used, start = [], [], 0
        for row, (count, total, past) in enumerate(zip(needed, totals, self.past, strict=True)):
            tables[row, :count] = order[start : start + count]
            start += count
            position = torch.arange(total)
            slot = tables[row, position // self.block_size] * self.block_size + position % self.block_size
            slots.append(slot[past:])
            used.append(slot)
        pools = []
        for width in (self.width, self.value_width):
            pool = torch.randn((len(order), self.block_size, self.kv_heads, width), generator=generator)
            dead = torch.ones(len(order) * self.block_size, dtype=torch.bool)
            dead[torch.cat(used)] = False
            pool.view(-1, self.kv_heads, width)[dead] = float("nan")
            pools.append(pool.to(self.dtype))
        shapes = [(self.heads, self.width), (self.kv_heads, self.width), (self.kv_heads, self.value_width)]
        qkv = [torch.randn((sum(self.new), *s), generator=generator).to(self.dtype) for s in shapes]
        starts = torch.tensor([0, *self.new]).cumsum(0).int()
        lengths = torch.tensor(totals, dtype=torch.int32)
        knobs = {"scale": self.width**-0.5, "window": self.window, "softcap": self.softcap}
        return [*qkv, *pools, torch.cat(slots).long(), tables, lengths, starts], knobs


CASES = {
    "plain": Case(),
    "block size 1": Case(block_size=1),
    "block size 16": Case(block_size=16),
    "window 1": Case(window=1),
    "window 8": Case(window=8, block_size=16),
    "window over tiles": Case(window=100),
    "chunks of 5": Case(window=-5),
    "chunks over tiles, capped": Case(window=-70, softcap=50.0, new=(150, 1), past=(30, 139)),
    "softcap": Case(softcap=5.0),
    "softcap and window": Case(softcap=50.0, window=70),
    "one head per group": Case(heads=2),
    "seven heads per group": Case(heads=14),
    "more heads than a tile has rows": Case(heads=80, kv_heads=2),
    "odd widths": Case(width=20, value_width=12),
    "wide": Case(width=128, value_width=128, heads=8),
    "long prefill": Case(new=(150,), past=(0,)),
    "decode": Case(new=(1,) * 5, past=(0, 1, 63, 64, 130)),
}


def compare(case: Case, kernel: Callable[..., Tensor], op: str = "paged_attention_", *more: Tensor) -> float:
    """Largest difference from the reference in float64; both must write the same pools. In 16 bits, as a multiple
    of what rounding the result once makes.

    Args:
        more: arguments of `op` behind those of `paged_attention_`.
    """
    inputs, knobs = case.inputs()
    pools = [pool.clone() for pool in inputs[3:5]]
    found = kernel(*inputs[:3], *pools, *inputs[5:], *more, **knobs)
    exact = [item.double() if item.is_floating_point() else item for item in inputs]
    exact[6] = exact[6].clamp(min=0)  # the reference reads the whole table before it cuts it
    expected = reference(op)(*exact, *more, **knobs)
    assert found.dtype == case.dtype
    assert found.shape == (sum(case.new), case.heads, case.value_width)
    for pool, wanted in zip(pools, exact[3:5], strict=True):
        torch.testing.assert_close(pool.double(), wanted, rtol=0, atol=0, equal_nan=True)
    difference = float((found.double() - expected).abs().max())
    if case.dtype is torch.float32:
        return difference
    return difference / float((expected.to(case.dtype).double() - expected).abs().max())
