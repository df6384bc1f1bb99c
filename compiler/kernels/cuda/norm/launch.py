"""Launch of `fused_norm`: one program per row."""

from __future__ import annotations

import triton
from torch import Tensor

from optc.compiler.kernels.cuda.dispatch import dependent_launch
from optc.compiler.kernels.cuda.norm import rows

ELEMENTS_PER_WARP = 1024
"""32 a thread, in registers."""


def fused_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    *,
    norm: str = "",
    eps: float = 0.0,
    factor: float = 1.0,
) -> Tensor:
    """The op, for calls that the kernel accepts."""
    size = x.shape[-1]
    source = x.reshape(-1, size)
    source = source if source.stride(1) == 1 else source.contiguous()
    y = source.new_empty(source.shape)
    if y.numel():
        block = triton.next_power_of_2(size)
        pdl = dependent_launch(x.device)
        rows.fused_norm[(y.shape[0],)](
            source, weight, bias, None if residual is None else residual.reshape(-1, size).contiguous(), y,
            source.stride(0), eps, factor, K=size, BLOCK=block, NORM=norm, PDL=pdl,
            num_warps=warps_for(block), launch_pdl=pdl,
        )  # fmt: skip
    return y.reshape(x.shape)


def warps_for(block: int) -> int:
    """Warps of a program whose row fills a block."""
    return max(block // ELEMENTS_PER_WARP, 1)
