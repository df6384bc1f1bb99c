"""MXFP4: 4-bit floats (E2M1) in blocks of 32 along the last axis, each with a power of two as its scale (E8M0).

    value = E2M1[code] * 2^(exponent - 127)

Source: OCP Microscaling Formats 1.0 (E2M1, E8M0), https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf.
Codes are stored one per byte; packing belongs to exporters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optc.compiler.ops.dialect.nvfp4 import VALUES, nearest_codes
from optc.compiler.ops.library import define

BLOCK = 32
BIAS = 127
_TOP = 2  # the exponent of 4, the largest power of two in E2M1


def quantize_mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [N,K] -> codes uint8 [N,K], exponents uint8 [N,K/32]; nearest, ties to even.

    A block's exponent is that of its largest magnitude less 2, as the standard has it, under which magnitudes beyond 6
    become 6; or one more, where that has the smaller squared error.
    """
    blocks = weight.float().unflatten(-1, (-1, BLOCK))
    largest = blocks.abs().amax(-1)
    found = torch.where(largest > 0, largest, 1.0).frexp().exponent - 1 - _TOP
    low = found.clamp(-BIAS, BIAS)
    high = (low + 1).clamp(max=BIAS)
    errors, codes = zip(*(_rounded(blocks, exponent) for exponent in (low, high)), strict=True)
    better = errors[1] < errors[0]
    exponent = torch.where(better, high, low)
    chosen = torch.where(better[..., None], codes[1], codes[0])
    return chosen.flatten(-2), (exponent + BIAS).to(torch.uint8)


def _rounded(blocks: Tensor, exponent: Tensor) -> tuple[Tensor, Tensor]:
    """(squared error of each block, its codes) under an exponent."""
    codes = nearest_codes(torch.ldexp(blocks, -exponent[..., None]))
    made = torch.ldexp(_values(codes), exponent[..., None])
    return (made - blocks).square().sum(-1), codes


def _values(codes: Tensor) -> Tensor:
    table = torch.tensor(VALUES, device=codes.device)
    return torch.cat([table, -table])[codes.long()]


def _dequantize_mxfp4(codes: Tensor, exponents: Tensor, *, dtype: torch.dtype) -> Tensor:
    """codes uint8 [...,K] below 16, exponents uint8 [...,K/32] -> [...,K] in `dtype`."""
    values = _values(codes).unflatten(-1, (-1, BLOCK))
    return torch.ldexp(values, exponents.int()[..., None] - BIAS).flatten(-2).to(dtype)


define(
    "dequantize_mxfp4(Tensor codes, Tensor exponents, *, ScalarType dtype) -> Tensor",
    _dequantize_mxfp4,
    lambda codes, _exponents, *, dtype: torch.empty_like(codes, dtype=dtype, memory_format=torch.contiguous_format),
    makes_weight=True,
)
