"""FP8 weights in blocks of 128 x 128, which layouts keep one scale of and programs one scale of each row."""

from __future__ import annotations

import torch
from torch import Tensor

from optc.compiler.formats.layouts.tensors import TensorReader
from optc.compiler.formats.layouts.weight import QuantizedWeight, Scheme
from optc.compiler.ops.dialect.quantization import FP8_BLOCK

BLOCK_SCHEME = Scheme(bits=8, group_size=FP8_BLOCK, symmetric=True, format="fp8", activations="fp8-128")
BLOCKS = [FP8_BLOCK, FP8_BLOCK]
"""Rows and columns of a block, as configs have it."""


def spread_rows(reader: TensorReader, name: str, scale: Tensor, rows: int) -> Tensor:
    """Scales of blocks [ceil(N / 128), G] -> of rows [N, G]; the last block may have fewer rows.

    Raises:
        InputError: another number of blocks; names the tensor.
    """
    blocks = -(-rows // FP8_BLOCK)
    if len(scale) != blocks:
        raise reader.wrong_shape(name, f"found {len(scale)} rows of blocks, expected {blocks} for {rows} rows")
    return scale.repeat_interleave(FP8_BLOCK, dim=0)[:rows]


def scales_of_blocks(weight: QuantizedWeight) -> Tensor:
    """[N, G] -> [ceil(N / 128), G]; see `block_obstacle`."""
    return weight.scale[::FP8_BLOCK].contiguous()


def block_obstacle(weight: QuantizedWeight) -> str | None:
    """Why a weight of fp8 codes in groups is not one of blocks, or None."""
    if weight.scheme.group_size != FP8_BLOCK:
        return f"fp8 weights in groups of {weight.scheme.group_size}: the layout has blocks of {FP8_BLOCK}"
    rows = weight.shape[0]
    if not torch.equal(scales_of_blocks(weight).repeat_interleave(FP8_BLOCK, dim=0)[:rows], weight.scale):
        return f"fp8 weights in groups whose scales differ within {FP8_BLOCK} rows"
    if weight.scheme.activations != "fp8-128":
        return f"fp8 weights in blocks with {weight.scheme.activations or 'unrounded'} inputs: run quantize-activations"
    return None
