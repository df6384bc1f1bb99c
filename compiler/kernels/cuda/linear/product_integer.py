"""A few tokens times a weight of 4- or 8-bit integers, on the 8-bit tensor cores.

`split_tokens` turns each token (after its norm) into 16-bit fixed point, with a scale per group of columns, in two
digits of base 256, each a signed byte. `product_integer` multiplies both with the weight: sums of a group are exact in
32 bits, and are scaled once per group. Nibbles become bytes times 16 by one AND and one shift, where a product of
floats would convert each weight and take off its offset.
"""

from __future__ import annotations

import triton
import triton.language as tl

from optc.compiler.kernels.cuda.primitives import (
    LEVELS,
    ROUNDER,
    SMALLEST,
    inverse_root_mean_square,
    layer_statistics,
    nan_maximum,
    prefetch,
    store_block,
    wait_for_producer,
)


@triton.jit
def split_tokens(
    x, norm_weight, norm_bias, digits, unit, sums, M, ROOM, eps,
    K: tl.constexpr, BITS: tl.constexpr, COLUMNS: tl.constexpr, NORM: tl.constexpr, BLOCK: tl.constexpr,
    STATISTICS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token and BLOCK of its columns per program, in groups of COLUMNS.

    Args:
        digits: int8 [2, 2, M, K/2] for 4 bits, high digits first: the columns that low nibbles hold, then those of
            high nibbles. int8 [2, M, K] for 8 bits.
        unit: float32 [K / COLUMNS, ROOM], what 1 stands for, times a weight as product_integer gets it; ROOM is M
            rounded up to whole blocks of product_integer.
        sums: float32 [K / COLUMNS, ROOM], of the elements of a group, or None.
    """
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * (BLOCK // COLUMNS) + tl.arange(0, BLOCK // COLUMNS)
    columns = group[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = columns < K
    if norm_weight is not None:
        gain = tl.load(norm_weight + columns, mask=inside, other=0.0).to(tl.float32)
    if norm_bias is not None:
        shift = tl.load(norm_bias + columns, mask=inside, other=0.0).to(tl.float32)
    wait_for_producer(PDL)
    values = tl.load(x + token * K + columns, mask=inside, other=0.0).to(tl.float32)
    if NORM == "rms":
        values *= inverse_root_mean_square(x + token * K, eps, K, STATISTICS)
    if NORM == "layer":
        mean, inverse = layer_statistics(x + token * K, eps, K, STATISTICS)
        values = tl.where(inside, (values - mean) * inverse, 0.0)
    if norm_weight is not None:
        values *= gain
    if norm_bias is not None:
        values += shift
    largest = tl.reduce(tl.abs(values), 1, nan_maximum)
    factor = LEVELS / nan_maximum(largest, SMALLEST)
    bits = (values * factor[:, None] + ROUNDER).to(tl.int32, bitcast=True)  # high digit, then low digit + 128
    if BITS == 4:
        half = (columns % 32) // 16
        place = half * (K // 2) * M.to(tl.int64) + token * (K // 2) + columns // 32 * 16 + columns % 16
    else:
        place = token * K + columns
    tl.store(digits + place, (bits >> 8).to(tl.int8), mask=inside)
    tl.store(digits + M.to(tl.int64) * K + place, (bits ^ 128).to(tl.int8), mask=inside)
    known = group < K // COLUMNS
    unit_scale: tl.constexpr = 1.0 / (LEVELS * 16.0) if BITS == 4 else 1.0 / LEVELS
    tl.store(unit + group * ROOM + token, largest * unit_scale, mask=known)
    if sums is not None:
        tl.store(sums + group * ROOM + token, tl.sum(values, 1), mask=known)


@triton.jit
def _low_nibbles(q, NATIVE: tl.constexpr):
    """Sixteen times the low nibbles of bytes, as signed bytes, four at a time."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; shl.b32 t, $1, 4; and.b32 $0, t, 0xF0F0F0F0; }",
            "=r,r", [q], dtype=tl.int8, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        return (q << 4).to(tl.int8)


@triton.jit
def _high_nibbles(q, NATIVE: tl.constexpr):
    """Sixteen times the high nibbles of bytes, as signed bytes, four at a time."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "and.b32 $0, $1, 0xF0F0F0F0;", "=r,r", [q], dtype=tl.int8, is_pure=True, pack=4
        )
    else:
        return q & -16


@triton.jit
def _group_product(
    w, digits, rows, tokens, group, M, K: tl.constexpr, BITS: tl.constexpr, COLUMNS: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """Products of COLUMNS columns from group * COLUMNS on: int32 [BLOCK_N, BLOCK_M]."""
    BYTES: tl.constexpr = COLUMNS * BITS // 8
    ROW_BYTES: tl.constexpr = K * BITS // 8
    block = group * BYTES + tl.arange(0, BYTES)
    q = tl.load(w + rows.to(tl.int64)[:, None] * ROW_BYTES + block[None, :], eviction_policy="evict_first")
    places = digits + tokens[None, :] * ROW_BYTES + block[:, None]
    plane = M.to(tl.int64) * K
    if BITS == 4:
        half = M.to(tl.int64) * (K // 2)
        first = _low_nibbles(q, NATIVE)
        second = _high_nibbles(q, NATIVE)
        total = tl.dot(first, tl.load(places), out_dtype=tl.int32)
        total = tl.dot(second, tl.load(places + half), total, out_dtype=tl.int32)
        total = total * 256
        total = tl.dot(first, tl.load(places + plane), total, out_dtype=tl.int32)
        total = tl.dot(second, tl.load(places + plane + half), total, out_dtype=tl.int32)
    else:
        total = tl.dot(q, tl.load(places), out_dtype=tl.int32)
        total = total * 256
        total = tl.dot(q, tl.load(places + plane), total, out_dtype=tl.int32)
    return total.to(tl.float32)


@triton.jit
def _prefetch_rows(
    w, scale, rows, part, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, COLUMNS: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """Ask for what a program reads of W, row by row: a step of the product reads no more than 64 or 128 bytes of a row
    at a time, and memory serves longer runs faster."""
    GROUPS: tl.constexpr = K // COLUMNS
    BYTES: tl.constexpr = COLUMNS * BITS // 8
    start = part * GROUPS // SPLIT * BYTES
    prefetch(w + rows.to(tl.int64) * (K * BITS // 8) + start, GROUPS // SPLIT * BYTES)
    if GROUP > 0 and GROUPS % 8 == 0:
        prefetch(scale + rows.to(tl.int64) * GROUPS, GROUPS * scale.dtype.element_ty.primitive_bitwidth // 8)


@triton.jit
def _scaled(
    total, unit, sums, scale, zero, rows, units, group, GROUPS: tl.constexpr, GROUP: tl.constexpr
):  # fmt: skip
    """Integer sums of a group as floats, with its zero point and scale, which are those of the row for GROUP 0."""
    total *= tl.load(unit + units)[None, :]
    place = rows if GROUP == 0 else rows * GROUPS + group
    if zero is not None:
        zeros = tl.load(zero + place).to(tl.float32)
        total -= zeros[:, None] * tl.load(sums + units)[None, :]
    if GROUP > 0:
        total *= tl.load(scale + place).to(tl.float32)[:, None]
    return total


@triton.jit
def product_integer(
    digits, unit, sums, w, scale, zero, bias, residual, y, partial, arrivals, M, N,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr, PREFETCH: tl.constexpr,
    NATIVE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y [M, N] of the tokens that split_tokens made; see `fused_linear`. N counts results.

    SPLIT programs share the columns of a block of results; the last of them to end adds what all have left in
    `partial`, in their order, so that results do not depend on which it is. It sets its counter back to zero.

    PREFETCH brings the weights into the second-level cache before the wait for the tokens.

    Args:
        partial: float32 [SPLIT, 1 or 2, M, N], scratch. arrivals: int32, zeros, one per block of results.
    """
    COLUMNS: tl.constexpr = GROUP if GROUP > 0 else 128
    GROUPS: tl.constexpr = K // COLUMNS
    block_n = tl.program_id(0)
    part = tl.program_id(1)
    block_m = tl.program_id(2)
    rows = tl.minimum(block_n * BLOCK_N + tl.arange(0, BLOCK_N), N - 1)
    tokens = tl.minimum(block_m * BLOCK_M + tl.arange(0, BLOCK_M), M - 1)
    if PREFETCH:
        _prefetch_rows(w, scale, rows, part, K, BITS, GROUP, COLUMNS, SPLIT)
        if GATED:
            _prefetch_rows(w, scale, rows + N, part, K, BITS, GROUP, COLUMNS, SPLIT)
    wait_for_producer(PDL)
    gate = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for group in tl.range(part * GROUPS // SPLIT, (part + 1) * GROUPS // SPLIT, num_stages=STAGES):
        units = group * (tl.num_programs(2) * BLOCK_M) + block_m * BLOCK_M + tl.arange(0, BLOCK_M)
        total = _group_product(w, digits, rows, tokens, group, M, K, BITS, COLUMNS, NATIVE)
        gate += _scaled(total, unit, sums, scale, zero, rows, units, group, GROUPS, GROUP)
        if GATED:
            total = _group_product(w, digits, rows + N, tokens, group, M, K, BITS, COLUMNS, NATIVE)
            up += _scaled(total, unit, sums, scale, zero, rows + N, units, group, GROUPS, GROUP)
    if GROUP == 0:
        gate *= tl.load(scale + rows).to(tl.float32)[:, None]
        if GATED:
            up *= tl.load(scale + N + rows).to(tl.float32)[:, None]
    store_block(
        y, bias, residual, partial, arrivals, block_n * BLOCK_N + tl.arange(0, BLOCK_N),
        block_m * BLOCK_M + tl.arange(0, BLOCK_M), M, N, gate, up, ACTIVATION, GATED, SPLIT,
    )  # fmt: skip
