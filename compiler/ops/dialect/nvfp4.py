"""NVFP4: 4-bit floats (E2M1) in blocks of 16 along the last axis, each with an E4M3 scale, under one float32 scale.

    value = E2M1[code] * (block_scale * scale)

E2M1 has the values 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives (bit 3 is the sign). Weights and activations are
the same arithmetic; of activations `scale` alone is calibrated, block scales are those of the values at hand:

    linear(dequantize_nvfp4(*quantize_nvfp4(x, scale_x), scale_x), dequantize_nvfp4(codes, block_scale, scale_w))

Source: OCP Microscaling Formats 1.0 (E2M1, E4M3), and the two-level scales of NVIDIA's Blackwell (cuBLAS and
TensorRT documentation, "NVFP4"). Codes are stored one per byte; packing belongs to exporters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optc.compiler.ops.library import define

BLOCK = 16
LARGEST = 6.0
"""Of E2M1."""
LARGEST_SCALE, SMALLEST_SCALE = 448.0, 2.0**-9
"""Of E4M3: what block scales are clamped to."""
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_MIDDLES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_UP = (0.75, 1.75, 3.5)
"""Middles that round up: the code above is the even one."""


def scale_of(largest: Tensor) -> Tensor:
    """The float32 scale under which the largest magnitude has the largest code and block scale; 1 where it is 0.

    It is the reciprocal of a float32 number, within a unit of the last place: compressed-tensors keeps that one.
    """
    scale = torch.where(largest > 0, largest.float() / (LARGEST * LARGEST_SCALE), 1.0)
    return 1 / (1 / scale)


def _quantize_nvfp4(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """x [...,K], scale float32 [1] -> codes uint8 [...,K], block scales float8 E4M3 [...,K/16]; nearest, ties to even."""
    blocks = x.float().unflatten(-1, (-1, BLOCK))
    largest = blocks.abs().amax(-1)
    ratio = torch.where(largest > 0, largest / (LARGEST * scale.float()), 1.0)
    block_scale = ratio.clamp(SMALLEST_SCALE, LARGEST_SCALE).to(torch.float8_e4m3fn)
    values = blocks / (block_scale.float() * scale.float())[..., None]
    return nearest_codes(values).flatten(-2), block_scale.contiguous()


def nearest_codes(values: Tensor) -> Tensor:
    """Codes uint8 of the E2M1 numbers next to some values; ties to the even code, beyond 6 that of 6."""
    size = values.abs().contiguous()
    codes = torch.bucketize(size, torch.tensor(_MIDDLES, device=values.device))
    up = torch.isin(size, torch.tensor(_UP, device=values.device))
    return (codes + up + 8 * (values < 0)).to(torch.uint8)


def _dequantize_nvfp4(codes: Tensor, block_scale: Tensor, scale: Tensor, *, dtype: torch.dtype) -> Tensor:
    """codes uint8 [...,K] below 16, block scales E4M3 [...,K/16], scale float32 [1] -> [...,K] in `dtype`."""
    table = torch.tensor(VALUES, device=codes.device)
    values = torch.cat([table, -table])[codes.long()].unflatten(-1, (-1, BLOCK))
    return (values * (block_scale.float() * scale.float())[..., None]).flatten(-2).to(dtype)


define(
    "quantize_nvfp4(Tensor x, Tensor scale) -> (Tensor, Tensor)",
    _quantize_nvfp4,
    lambda x, _scale: (
        torch.empty_like(x, dtype=torch.uint8, memory_format=torch.contiguous_format),
        x.new_empty((*x.shape[:-1], x.shape[-1] // BLOCK), dtype=torch.float8_e4m3fn),
    ),
    activation_codes=lambda _: "nvfp4",
)
define(
    "dequantize_nvfp4(Tensor codes, Tensor block_scale, Tensor scale, *, ScalarType dtype) -> Tensor",
    _dequantize_nvfp4,
    lambda codes, _block_scale, _scale, *, dtype: torch.empty_like(
        codes, dtype=dtype, memory_format=torch.contiguous_format
    ),
    makes_weight=True,
    makes_activation=True,
)
