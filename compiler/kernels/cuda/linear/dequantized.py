"""Packed weights in the type of the tokens, for products by cuBLAS: made for one product, or kept where memory has room."""

from __future__ import annotations

import torch
import triton
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from optc.compiler.kernels.cuda.linear.call import BITS
from optc.compiler.kernels.cuda.linear.dequantize import dequantize_rows

BLOCK = 2048
_KEPT = WeakTensorKeyDictionary()
"""From packed weights to their copies, which are gone when the weights are."""


def dequantized(
    weight: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    *,
    columns: int,
    format: str,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weight [N, K]: the copy that is kept, or a new one.

    Args:
        columns: K. group_size: 0 for a scale per row. The others as `fused_linear` has them.
    """
    kept = _KEPT.get(weight)
    if kept is not None and kept.dtype is dtype:
        return kept
    bits = BITS.get(format, 8)
    y = torch.empty((weight.shape[0], columns), dtype=dtype, device=weight.device)
    dequantize_rows[weight.shape[0], triton.cdiv(columns * bits // 8, BLOCK)](
        weight.view(torch.int8) if format in BITS else weight,
        scale, zero, y, weight.shape[0], K=columns, GROUP=group_size or columns, BITS=bits, BLOCK=BLOCK,
    )  # fmt: skip
    return y


def keep(weight: Tensor, copy: Tensor) -> None:
    """Let `dequantized` give this copy of a weight from now on, as long as the weight lives."""
    _KEPT[weight] = copy
