"""The sequential part of GPTQ: rounding a block of columns one after the other.

Each column is a few small operations. On a GPU launching them costs more than computing them, and a Triton kernel takes the
whole block in one launch.
"""

from __future__ import annotations

import torch
from torch import Tensor


def round_block(
    block: Tensor, target: Tensor, upper: Tensor, scale: Tensor, zero: Tensor, top: float
) -> tuple[Tensor, Tensor]:
    """Round C columns of a weight in order, moving each one's error to the next.

    Args:
        block: [C, N], columns as rows.
        target: [C, N], the block with what earlier columns ask of it; it may be changed in place.
        upper: [C, C], the block of `Factor.upper`.
        scale, zero: [C, N], the grid of each column.
        top: the largest code.

    Returns:
        codes [C, N], and gaps [C, N]: what rounding took away from `block`.
    """
    if block.device.type == "cuda":
        from optc.compiler.kernels.cuda.gptq import launch  # Triton is of machines with a GPU

        return launch.round_block(block, target, upper, scale, zero, top)
    return round_by_columns(block, target, upper, scale, zero, top)


def round_by_columns(
    block: Tensor, target: Tensor, upper: Tensor, scale: Tensor, zero: Tensor, top: float
) -> tuple[Tensor, Tensor]:
    """The same by operations of torch, on any device; the reference of the kernel."""
    codes, gaps = torch.empty_like(block), torch.empty_like(block)
    count = len(block)
    columns = zip(*(item.unbind() for item in (block, target, scale, zero, codes, gaps)), strict=True)
    for i, (column, wanted, step, middle, code, gap) in enumerate(columns):
        torch.div(wanted, step, out=code).add_(middle).round_().clamp_(0, top)
        torch.sub(code, middle, out=gap).mul_(step)
        torch.sub(column, gap, out=gap)
        if i + 1 < count:
            target[i + 1 :].addr_(upper[i, i + 1 :], gap)
    return codes, gaps
