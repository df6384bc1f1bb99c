"""Launch of `select_rows`: programs for parts of a row, so that one token is looked up by many threads."""

from __future__ import annotations

import triton
from torch import Tensor

from optc.compiler.kernels.cuda.dispatch import dependent_launch
from optc.compiler.kernels.cuda.rows import select

BLOCK, WARPS = 1024, 4
"""Elements of a program: of 16 bits, a load of 16 bytes for each thread."""


def select_rows(rows: Tensor, indices: Tensor, *, factor: float = 1.0) -> Tensor:
    """The op, for calls that the kernel accepts."""
    count, columns = rows.shape
    y = rows.new_empty((*indices.shape, columns))
    if y.numel():
        pdl = dependent_launch(rows.device)
        select.select_rows[(indices.numel(), triton.cdiv(columns, BLOCK))](
            rows, indices.contiguous(), y, count, rows.stride(0), factor, C=columns, BLOCK=BLOCK, PDL=pdl,
            num_warps=WARPS, launch_pdl=pdl,
        )  # fmt: skip
    return y
