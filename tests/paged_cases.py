"""Calls of paged attention on ragged requests, for the kernels of every device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
