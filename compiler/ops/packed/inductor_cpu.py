"""Linears as the C++ op library (compiler/kernels/cpu) multiplies them on the CPU: over packed codes, and of few rows.

`linear_nbits` and `linear_few` are made by legalization only. Codes lie in tiles of 16 rows of the weight; the layout is described in
`compiler/kernels/cpu/nbits.h`, and `pack_tiles` writes it. Rounding activations to int8 per group, so that products are of integers,
is what llama.cpp's Q8 blocks and ONNX Runtime's accuracy_level 4 do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optc.compiler.ops.library import define
from optc.compiler.ops.packed.rounded_inputs import round_activations

TILE_ROWS = 16
KEPT, PER_TOKEN = -1, 0
"""`activation_group`: activations as they are, or rounded with one scale per token."""


def block_columns(bits: int) -> int:
    """Neighbours along K that are packed together."""
    return 32 if bits == 3 else 32 // bits


def segment_size(columns: int, group_size: int, activation_group: int) -> int:
    """Neighbours along K that share every scale."""
    group = group_size or columns
    return min(group, activation_group) if activation_group > 0 else group


def pack_tiles(codes: Tensor, bits: int, segment: int) -> Tensor:
    """uint8 [N, K] below 2^bits -> uint8 [ceil(N / 16), bytes of a tile]; missing rows and columns are zeros."""
    rows, columns = codes.shape
    width = block_columns(bits)
    parts = codes.reshape(rows, columns // segment, segment)
    parts = torch.nn.functional.pad(parts, (0, -segment % width, 0, 0, 0, -rows % TILE_ROWS))
    quads = parts.reshape(-1, TILE_ROWS, parts.shape[1], parts.shape[2] // width, width // 4, 4)
    quads = quads.permute(0, 2, 3, 4, 1, 5)  # tile, segment, block, quad, row, column
    if bits == 8:
        packed = quads
    elif bits == 3:
        low = _overlay((quads & 3).unflatten(3, (2, 4)), 2)
        packed = torch.cat([low, _overlay(quads >> 2, 1)[:, :, :, None]], 3)
    else:
        packed = _overlay(quads, bits)
    return packed.flatten(1).contiguous()


def _overlay(quads: Tensor, bits: int) -> Tensor:
    """[..., quads, 16, 4] -> [..., 16, 4], quad i in the bits from bits * i on."""
    total = torch.zeros_like(quads.select(-3, 0))
    for index in range(quads.shape[-3]):
        total = total | (quads.select(-3, index) << (bits * index))
    return total


def unpack_tiles(packed: Tensor, bits: int, segment: int, rows: int, columns: int) -> Tensor:
    """The inverse of `pack_tiles`: uint8 [N, K]."""
    width, segments = block_columns(bits), columns // segment
    blocks = -(-segment // width)
    parts = packed.reshape(packed.shape[0], segments, blocks, -1, TILE_ROWS, 4)
    if bits == 3:
        low = _spread(parts[:, :, :, :2], 2, 4).flatten(3, 4)
        quads = low | (_spread(parts[:, :, :, 2:], 1, 8).flatten(3, 4) << 2)
    else:
        quads = _spread(parts, bits, 8 // bits).flatten(3, 4)
    codes = quads.permute(0, 4, 1, 2, 3, 5).reshape(-1, segments, blocks * width)
    return codes[:rows, :, :segment].reshape(rows, columns)


def _spread(packed: Tensor, bits: int, count: int) -> Tensor:
    """[..., 16, 4] -> [..., count, 16, 4]"""
    return torch.stack([(packed >> (bits * index)) & (2**bits - 1) for index in range(count)], -3)


def packed_rows(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    indices: Tensor,
    *,
    bits: int,
    segment: int,
    group_size: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows [..., K] of a weight [N, K] that `linear_nbits` takes, in plain ATen: no more is read than the rows.

    Args:
        packed, scale, zero: as `linear_nbits` has them. indices: int64 [...].
        bits: 2, 4 or 8. group_size: not 0. columns: K. dtype: of the result; it is computed in float32.
    """
    width, segments = block_columns(bits), columns // segment
    rows = indices.flatten()
    parts = packed.reshape(packed.shape[0], segments, -(-segment // width), TILE_ROWS, 4)
    found = parts[rows // TILE_ROWS, :, :, rows % TILE_ROWS]
    quads = [(found >> (bits * index)) & (2**bits - 1) for index in range(8 // bits)]
    codes = torch.stack(quads, 3).flatten(2)[:, :, :segment].reshape(-1, columns // group_size, group_size)
    middle = 2 ** (bits - 1) if zero is None else zero.index_select(1, rows).t()[..., None].float()
    values = (codes.float() - middle) * scale.index_select(1, rows).t()[..., None].float()
    return values.reshape(*indices.shape, columns).to(dtype)


def pack_rows(values: Tensor) -> Tensor:
    """Scales or zero points [N, G] -> [G, N rounded up to whole tiles]."""
    return torch.nn.functional.pad(values.t(), (0, -values.shape[0] % TILE_ROWS)).contiguous()


def _linear_nbits(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    table: Tensor | None,
    *,
    bits: int,
    group_size: int,
    activation_group: int,
    K: int,
    N: int,
) -> Tensor:
    """x [..., K] times the weight [N, K] whose codes are packed, computed in float32.

    Args:
        packed: uint8, by `pack_tiles`. scale: [G, N up to whole tiles]; zero: uint8 of that shape, absent for the
            middle code. bias: [N].
        table: float32 [16], the values of the codes (NF4, for one), for `activation_group` -1.
        activation_group: -1 takes x as it is; else x is rounded to int8 in groups of so many columns (0: per token).
    """
    segment = segment_size(K, group_size, activation_group)
    codes = unpack_tiles(packed, bits, segment, N, K)
    scales = scale[:, :N].t().float()
    if table is None:
        zeros = None if zero is None else zero[:, :N].t()
        weight = torch.ops.optc.dequantize(codes, scales, zeros, bits=bits, group_size=group_size)
    else:
        weight = torch.ops.optc.dequantize_codebook(codes, scales, table, bits=bits, group_size=group_size)
    values = x.float() if activation_group == KEPT else round_activations(x, activation_group)
    out = torch.nn.functional.linear(values, weight, None if bias is None else bias.float())
    return out.to(x.dtype)


define(
    "linear_nbits(Tensor x, Tensor packed, Tensor scale, Tensor? zero, Tensor? bias, Tensor? table, *, "
    "int bits, int group_size, int activation_group, int K, int N) -> Tensor",
    _linear_nbits,
    lambda x, *_, N, **__: x.new_empty((*x.shape[:-1], N)),
    rounds_inside=lambda keywords: keywords["activation_group"] != KEPT,
)

define(
    "linear_few(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    lambda x, weight, bias: torch.nn.functional.linear(x, weight, bias),
    lambda x, weight, bias: x.new_empty((*x.shape[:-1], weight.shape[0])),
)
"""x [..., K] times weight [N, K], plus bias [N]: a linear that reads its weight once for the few rows of steps."""
