"""Launch of `round_columns`: a warp for a few rows, so that sums over columns cross no barrier."""

from __future__ import annotations

import triton
from torch import Tensor

from optc.compiler.kernels.cuda.gptq.columns import round_columns

BLOCK, WARPS = 16, 1
"""Rows of a program. With 128 columns their gaps take 64 registers of each of its threads."""


def round_block(
    block: Tensor, target: Tensor, upper: Tensor, scale: Tensor, zero: Tensor, top: float
) -> tuple[Tensor, Tensor]:
    """As `optc.passes.quantization.arithmetic.column_blocks.round_block`, in another order of sums; `target` stays.

    Args:
        block, target, scale, zero: float32 [C, N] on a GPU. upper: [C, C].
    """
    block, target, scale, zero = (item.contiguous() for item in (block, target, scale, zero))
    count, rows = block.shape
    codes, gaps = block.new_empty(block.shape), block.new_empty(block.shape)
    asks = upper.triu(1).t().contiguous()
    if rows:
        round_columns[(triton.cdiv(rows, BLOCK),)](
            block, target, asks, scale, zero, codes, gaps, count, rows, top,
            C=triton.next_power_of_2(count), BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return codes, gaps
