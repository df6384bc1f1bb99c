"""Launch of `packed_embedding`: one program per token."""

from __future__ import annotations

import triton
from torch import Tensor

from optc.compiler.kernels.cuda.dispatch import dependent_launch
from optc.compiler.kernels.cuda.lookup import rows
from optc.compiler.kernels.cuda.norm.launch import warps_for
from optc.compiler.ops.packed.cuda import packed_columns


def packed_embedding(
    weight: Tensor, scale: Tensor, zero: Tensor | None, indices: Tensor, *, format: str, group_size: int
) -> Tensor:
    """The op, for calls that the kernel accepts. A token outside the table gets NaN."""
    columns = packed_columns(weight, format)
    tokens = indices.reshape(-1)
    y = scale.new_empty((tokens.shape[0], columns))
    if y.numel():
        block = triton.next_power_of_2(columns)
        pdl = dependent_launch(indices.device)
        rows.packed_embedding[(y.shape[0],)](
            weight, scale, zero, tokens, y, weight.shape[0], tokens.stride(0), K=columns, BLOCK=block,
            GROUP=group_size or columns, BITS=4 if format == "int4" else 8, PDL=pdl,
            num_warps=warps_for(block), launch_pdl=pdl,
        )  # fmt: skip
    return y.reshape(*indices.shape, columns)
