"""A few tokens times a weight of 4- or 8-bit integers, on the 8-bit tensor cores.

`split_tokens` turns each token (after its norm) into 16-bit fixed point with one scale, in two digits of base 256, each
a signed byte. `product_integer` multiplies both with the weight: sums of a group of columns are exact in 32 bits, and
are scaled once per group. Nibbles become bytes times 16 by one AND and one shift, where a product of floats would
convert each weight and take off its offset. A norm bounds what the one scale costs: no element is above sqrt(K) times
the root mean square, so 16 bits are 2^-16 * sqrt(K) of that, 0.2 % at K = 16384.
"""

from __future__ import annotations

import triton
import triton.language as tl

from optc.compiler.kernels.cuda.primitives import (
    LEVELS,
    SMALLEST,
    bring_rows,
    let_next_start,
    load_normalized,
    nan_maximum,
    store_block,
    wait_for_producer,
)


@triton.jit
def split_tokens(
    x, norm_weight, norm_bias, digits, unit, group_sums, M, eps,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, NORM: tl.constexpr, BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One token per program; BLOCK_K is a power of two from K on.

    Args:
        digits: int8 [2, M, 2, K/2] for 4 bits: the columns that low nibbles hold, then those of high nibbles; of each
            token high digits, then low ones. int8 [M, 2, K] for 8 bits.
        unit: float32 [M], what 1 stands for, times a weight as product_integer gets it.
        group_sums: float32 [M, K / GROUP], sums of the numbers of a group times 16 (for 4 bits), or None.
    """
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_K)
    inside = columns < K
    values = load_normalized(x + token * K, norm_weight, norm_bias, eps, K, NORM, BLOCK_K, PDL)
    largest = tl.reduce(tl.abs(values), 0, nan_maximum)
    scaled = values * (LEVELS / nan_maximum(largest, SMALLEST))
    number = (scaled + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
    high = (number + 128) >> 8
    if BITS == 4:
        half = (columns % 32) // 16
        place = half * K * M.to(tl.int64) + token * K + columns // 32 * 16 + columns % 16
        tl.store(unit + token, largest * (1.0 / (LEVELS * 16.0)))
    else:
        place = token * (2 * K) + columns
        tl.store(unit + token, largest * (1.0 / LEVELS))
    tl.store(digits + place, high.to(tl.int8), mask=inside)
    tl.store(digits + K * BITS // 8 + place, number.to(tl.int8), mask=inside)
    if group_sums is not None:
        number = tl.where(inside, number, 0)
        GROUPS: tl.constexpr = BLOCK_K // GROUP  # one where the group is the row, of any length
        groups = tl.arange(0, GROUPS)
        sums = tl.sum(tl.reshape(number, [GROUPS, BLOCK_K // GROUPS]), 1).to(tl.float32)
        tl.store(
            group_sums + token * (K // GROUP) + groups, sums * (16.0 if BITS == 4 else 1.0), mask=groups < K // GROUP
        )


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
    JOINED: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Products of COLUMNS columns from group * COLUMNS on: float32 [BLOCK_N, BLOCK_M].

    JOINED: one product with both digits of all tokens, side by side, instead of two.
    """
    BYTES: tl.constexpr = COLUMNS * BITS // 8
    ROW_BYTES: tl.constexpr = K * BITS // 8
    block = group * BYTES + tl.arange(0, BYTES)
    q = tl.load(w + rows.to(tl.int64)[:, None] * ROW_BYTES + block[None, :], eviction_policy="evict_first")
    half = M.to(tl.int64) * K
    if JOINED:
        BLOCK_M: tl.constexpr = tokens.shape[0]
        both = tl.reshape(tl.join(tokens * 2, tokens * 2 + 1), [2 * BLOCK_M])
        places = digits + both[None, :] * ROW_BYTES + block[:, None]
        if BITS == 4:
            total = tl.dot(_low_nibbles(q, NATIVE), tl.load(places), out_dtype=tl.int32)
            total = tl.dot(_high_nibbles(q, NATIVE), tl.load(places + half), total, out_dtype=tl.int32)
        else:
            total = tl.dot(q, tl.load(places), out_dtype=tl.int32)
        high, low = tl.split(tl.reshape(total, [rows.shape[0], BLOCK_M, 2]))
        return (high * 256 + low).to(tl.float32)
    else:
        places = digits + tokens[None, :] * (2 * ROW_BYTES) + block[:, None]
        if BITS == 4:
            first = _low_nibbles(q, NATIVE)
            second = _high_nibbles(q, NATIVE)
            total = tl.dot(first, tl.load(places), out_dtype=tl.int32)
            total = tl.dot(second, tl.load(places + half), total, out_dtype=tl.int32)
            total = total * 256
            total = tl.dot(first, tl.load(places + ROW_BYTES), total, out_dtype=tl.int32)
            total = tl.dot(second, tl.load(places + ROW_BYTES + half), total, out_dtype=tl.int32)
        else:
            total = tl.dot(q, tl.load(places), out_dtype=tl.int32)
            total = total * 256
            total = tl.dot(q, tl.load(places + ROW_BYTES), total, out_dtype=tl.int32)
        return total.to(tl.float32)


@triton.jit
def _factors(scale, zero, rows, group, GROUPS: tl.constexpr):
    """Scales and zero points of rows, float32 [BLOCK_N]."""
    place = rows * GROUPS + group
    factor = tl.load(scale + place).to(tl.float32)
    offset = factor
    if zero is not None:
        offset = tl.load(zero + place).to(tl.float32)
    return factor, offset


@triton.jit
def _scaled(total, factor, offset, zero, group_sums, tokens, group, GROUPS: tl.constexpr, share=1.0):
    """Sums of a group with its scale and `share` of its zero point: float32 [BLOCK_N, BLOCK_M]."""
    if zero is not None:
        sums = tl.load(group_sums + tokens * GROUPS + group) * share
        total -= offset[:, None] * sums[None, :]
    return total * factor[:, None]


@triton.jit
def product_integer(
    digits, unit, group_sums, w, scale, zero, bias, residual, y, partial, arrivals, M, N,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr, LINES: tl.constexpr,
    JOINED: tl.constexpr, NATIVE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y [M, N] of the tokens that split_tokens made; see `fused_linear`. N counts results.

    LINES of each of its rows a program asks for before it waits for the tokens; see `bring_rows`.

    SPLIT programs share the columns of a block of results; the last of them to end adds what all have left in
    `partial`, in their order, so that results do not depend on which it is. It sets its counter back to zero.

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
    if PDL and LINES > 0:
        BYTES: tl.constexpr = COLUMNS * BITS // 8
        begin = part * GROUPS // SPLIT * BYTES
        end = (part + 1) * GROUPS // SPLIT * BYTES
        bring_rows(w, rows, begin, end, K * BITS // 8, LINES)
        if GATED:
            bring_rows(w, rows + N, begin, end, K * BITS // 8, LINES)
        let_next_start(PDL)
    wait_for_producer(PDL)
    gate = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    begin_group = part * GROUPS // SPLIT
    end_group = (part + 1) * GROUPS // SPLIT
    if GROUP > 0:  # loaded a group ahead
        factor, offset = _factors(scale, zero, rows, begin_group, GROUPS)
        up_factor = factor
        up_offset = offset
        if GATED:
            up_factor, up_offset = _factors(scale, zero, rows + N, begin_group, GROUPS)
    for group in tl.range(begin_group, end_group, num_stages=STAGES):
        if GROUP > 0:
            next_group = tl.minimum(group + 1, end_group - 1)
            next_factor, next_offset = _factors(scale, zero, rows, next_group, GROUPS)
            next_up_factor = next_factor
            next_up_offset = next_offset
            if GATED:
                next_up_factor, next_up_offset = _factors(scale, zero, rows + N, next_group, GROUPS)
        total = _group_product(w, digits, rows, tokens, group, M, K, BITS, COLUMNS, JOINED, NATIVE)
        if GROUP > 0:
            total = _scaled(total, factor, offset, zero, group_sums, tokens, group, GROUPS)
        gate += total
        if GATED:
            total = _group_product(w, digits, rows + N, tokens, group, M, K, BITS, COLUMNS, JOINED, NATIVE)
            if GROUP > 0:
                total = _scaled(total, up_factor, up_offset, zero, group_sums, tokens, group, GROUPS)
            up += total
        if GROUP > 0:
            factor = next_factor
            offset = next_offset
            up_factor = next_up_factor
            up_offset = next_up_offset
    if GROUP == 0:
        share = 1.0 if SPLIT == 1 else tl.where(part == 0, 1.0, 0.0)  # one program takes the zero points off
        factor, offset = _factors(scale, zero, rows, 0, 1)
        gate = _scaled(gate, factor, offset, zero, group_sums, tokens, 0, 1, share)
        if GATED:
            up_factor, up_offset = _factors(scale, zero, rows + N, 0, 1)
            up = _scaled(up, up_factor, up_offset, zero, group_sums, tokens, 0, 1, share)
    store_block(
        y, bias, residual, partial, arrivals, block_n * BLOCK_N + tl.arange(0, BLOCK_N),
        block_m * BLOCK_M + tl.arange(0, BLOCK_M), unit, M, N, gate, up, ACTIVATION, GATED, SPLIT,
    )  # fmt: skip
