"""One token times a weight of 4- or 8-bit integers on the tensor cores: rows of W by the token's two digits.

The token is the fixed-point numbers of `gemv_integer`, with one scale for what four threads hold together (128 columns
of 4 bits, 64 of 8). A product of the tensor cores has 16 rows of W, 32 columns and 8 tokens, of which two are used: the
low digits and the high ones; the others repeat them. That takes a third of the instructions of dp4a, and sums over columns within a warp on the
way. A weight stays in the registers that it was loaded into: which columns meet in a product does not matter as long as
the digits are in the same order, so each thread has 16 bytes of two rows, and gets its digits from the thread that made
them (one shuffle each).

`fragments` says what a thread has of rows, columns and results.
"""

from __future__ import annotations

import triton
import triton.language as tl

from optc.compiler.kernels.cuda.linear.fragments import high_nibbles, low_nibbles, multiply
from optc.compiler.kernels.cuda.linear.gemv_integer import fixed_point, largest_of, load_ends
from optc.compiler.kernels.cuda.primitives import (
    layer_statistics,
    let_next_start,
    load_at,
    load_run,
    load_words,
    nan_maximum,
    store_rows,
    wait_for_producer,
)
from optc.compiler.kernels.cuda.sums import meet, over_lanes

ROWS = tl.constexpr(16)
"""Rows of W in a product."""
SHARES = tl.constexpr(8)
"""Parts of a warp's columns, each of 16 bytes a thread."""


@triton.jit
def _of_lane(value, lane, WARPS: tl.constexpr, NATIVE: tl.constexpr):
    """The value, of 32 bits, that another thread of the warp has."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, $2, 31, -1;", "=r,r,r", [value, lane], dtype=tl.int32, is_pure=False, pack=1
        )
    else:
        return tl.gather(value, tl.arange(0, 32 * WARPS) // 32 * 32 + lane, 0)


@triton.jit
def _float_of_lane(value, lane, WARPS: tl.constexpr, NATIVE: tl.constexpr):
    return _of_lane(value.to(tl.int32, bitcast=True), lane, WARPS, NATIVE).to(tl.float32, bitcast=True)


@triton.jit
def _dealt(digits, QUADS: tl.constexpr, WARPS: tl.constexpr, NATIVE: tl.constexpr):
    """For each share of the columns the words of digits that a thread multiplies with: QUADS of them each.

    Lane 4 s + q made the digits of what threads q have of share s. Even columns of a product take the low ones and odd
    columns the high ones, so that each thread finds both sums of its rows in its part of the result. Halves of the warp
    first swap low and high, so that what a thread takes is in the same register for all.
    """
    lane = tl.arange(0, 32 * WARPS) % 32
    upper = lane >= 16
    source = (lane // 4 % 2) * 16 + lane % 4
    found = ()
    first = ()
    second = ()
    for i in tl.static_range(QUADS):
        low = digits[2 * i]
        high = digits[2 * i + 1]
        got = _of_lane(tl.where(upper, low, high), lane ^ 16, WARPS, NATIVE)
        first = first + (tl.where(upper, got, low),)
        second = second + (tl.where(upper, high, got),)
    for share in tl.static_range(SHARES):
        words = ()
        for i in tl.static_range(QUADS):
            if share < SHARES // 2:
                words = words + (_of_lane(first[i], source + 4 * share, WARPS, NATIVE),)
            else:
                words = words + (_of_lane(second[i], source + (4 * share - 16), WARPS, NATIVE),)
        found = found + (words,)
    return found


@triton.jit
def _load_sixteen(w, place, K: tl.constexpr, BITS: tl.constexpr, NATIVE: tl.constexpr):
    """Of the rows at `place` (words from `w` on) and 8 further ones, 16 bytes of each share; shares are 16 words apart."""
    found = ()
    for share in tl.static_range(SHARES):
        if NATIVE:
            found = found + (
                load_words(w + place, 64 * share, True)
                + load_words(w + place + 8 * (K * BITS // 32), 64 * share, True),
            )
        else:
            words = ()
            for i in tl.static_range(4):
                words = words + (tl.load(w + place + 16 * share + i),)
            for i in tl.static_range(4):
                words = words + (tl.load(w + place + 8 * (K * BITS // 32) + 16 * share + i),)
            found = found + (words,)
    return found


@triton.jit
def _load_scales(scale, place, GROUPS: tl.constexpr, NATIVE: tl.constexpr):
    """Scales of a thread's two rows in each share: those of the first row, then those of the second, float32."""
    found = ()
    for part in tl.static_range(2):
        if NATIVE:
            words = load_words(scale + place + part * 8 * GROUPS, 0, False)
            for i in tl.static_range(4):
                word = words[i]
                if scale.dtype.element_ty == tl.bfloat16:
                    found = found + (
                        (word << 16).to(tl.float32, bitcast=True),
                        (word & -65536).to(tl.float32, bitcast=True),
                    )
                else:
                    found = found + (
                        word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32),
                        (word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32),
                    )
        else:
            for i in tl.static_range(SHARES):
                found = found + (tl.load(scale + place + part * 8 * GROUPS + i).to(tl.float32),)
    return found


@triton.jit
def _block(
    words, scales, digits, units, GROUPED: tl.constexpr, BITS: tl.constexpr, WARPS: tl.constexpr, NATIVE: tl.constexpr
):
    """Of 16 rows the sums over a warp's columns: row g in threads 4 g and 4 g + 2, row g + 8 in the two others."""
    zero = tl.zeros([32 * WARPS], tl.int32)
    upper = tl.zeros([32 * WARPS], tl.float32)
    lower = upper
    for share in tl.static_range(SHARES):
        sums = (zero, zero, zero, zero)
        own = words[share]
        for i in tl.static_range(16 // BITS):
            if BITS == 4:
                a = (low_nibbles(own[i]), low_nibbles(own[i + 4]), high_nibbles(own[i]), high_nibbles(own[i + 4]))
                b = (digits[share][i], digits[share][i + 4])
            else:
                a = (own[2 * i], own[2 * i + 4], own[2 * i + 1], own[2 * i + 5])
                b = (digits[share][2 * i], digits[share][2 * i + 1])
            sums = multiply(a[0], a[1], a[2], a[3], b[0], b[1], sums[0], sums[1], sums[2], sums[3], NATIVE)
        first = units[share]
        second = units[share]
        if GROUPED:
            first = scales[share] * units[share]
            second = scales[share + SHARES] * units[share]
        upper += (sums[1] * 256 + sums[0]).to(tl.float32) * first
        lower += (sums[3] * 256 + sums[2]).to(tl.float32) * second
    return tl.where(tl.arange(0, 32 * WARPS) % 2 == 0, upper, lower)


@triton.jit
def gemv_tensor(
    x, w, scale, norm_weight, norm_bias, bias, residual, y, M, N, eps,
    K: tl.constexpr, BITS: tl.constexpr, GROUPED: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr,
    GATED: tl.constexpr, STEPS: tl.constexpr, STATISTICS: tl.constexpr, WARPS: tl.constexpr, NATIVE: tl.constexpr,
    EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """See `gemv_integer`. K * BITS is 4096 for each of the WARPS; N is a multiple of 16 STEPS; no zero points.

    GROUPED: a scale, of 16 bits, for each 128 columns of 4 bits; else one per row.
    """
    ROW_WORDS: tl.constexpr = K * BITS // 32
    GROUPS: tl.constexpr = K // 128
    COLUMNS: tl.constexpr = 128 // BITS
    PARTS: tl.constexpr = 2 if GATED else 1
    let_next_start(PDL and EARLY)
    token = tl.program_id(0) % M
    first_row = tl.program_id(0) // M * (ROWS * STEPS)
    x += token.to(tl.int64) * K
    y += token.to(tl.int64) * N
    if residual is not None:
        residual += token.to(tl.int64) * N
    thread = tl.arange(0, 32 * WARPS)
    row = thread % 32 // 4
    place = row * ROW_WORDS + thread // 32 * 128 + thread % 4 * 4
    scale_place = row * GROUPS + thread // 32 * SHARES
    own = w + first_row.to(tl.int64) * ROW_WORDS
    own_scale = scale
    if GROUPED:
        own_scale += first_row * GROUPS
    tile = ()
    scales = ()
    for part in tl.static_range(PARTS):
        tile = tile + (_load_sixteen(own + part * N.to(tl.int64) * ROW_WORDS, place, K, BITS, NATIVE),)
        if GROUPED:
            scales = scales + (_load_scales(own_scale + part * N * GROUPS, scale_place, GROUPS, NATIVE),)
        else:
            scales = scales + ((),)
    rows = first_row + tl.arange(0, 32) // 4 + tl.arange(0, 32) % 2 * 8
    ends = load_ends(scale, None, bias, rows, N, GATED, 1 if GROUPED else 0, False)
    let_next_start(PDL)
    wait_for_producer(PDL)
    loaded = load_run(x, thread, COLUMNS, NATIVE)
    left = load_at(residual, rows, N)
    if NORM == "layer":
        mean, inverse = layer_statistics(x, eps, K, STATISTICS)
    else:
        mean, inverse = 0.0, 1.0
    normed, squares = largest_of(
        loaded, x, norm_weight, norm_bias, thread, mean, inverse, K, BITS, 32 * WARPS, NORM, NATIVE
    )
    lane = thread % 32
    largest = nan_maximum(normed[0], _float_of_lane(normed[0], lane ^ 1, WARPS, NATIVE))
    largest = nan_maximum(largest, _float_of_lane(largest, lane ^ 2, WARPS, NATIVE))
    digits, unit = fixed_point(normed[1:], largest, BITS, NATIVE)
    units = ()
    for share in tl.static_range(SHARES):
        units = units + (_float_of_lane(unit, 4 * share + lane * 0, WARPS, NATIVE),)
    dealt = _dealt(digits, 32 // BITS, WARPS, NATIVE)
    others = ()
    if NORM == "rms":
        others = others + (over_lanes((squares,), 1, 32 * WARPS, WARPS, NATIVE),)
    for turn in tl.range(0, STEPS):
        sums = ()
        for part in tl.static_range(PARTS):
            sums = sums + (_block(tile[part], scales[part], dealt, units, GROUPED, BITS, WARPS, NATIVE),)
        if STEPS > 1:
            more = tl.minimum(tl.maximum(STEPS - 1 - turn, 0), 1)  # in the interpreter turn is a Python number
            next_row = (turn + 1) * more * ROWS
            tile = ()
            scales = ()
            for part in tl.static_range(PARTS):
                begin = own + part * N.to(tl.int64) * ROW_WORDS + next_row * ROW_WORDS
                tile = tile + (_load_sixteen(begin, place * more, K, BITS, NATIVE),)
                if GROUPED:
                    begin_scale = own_scale + part * N * GROUPS + next_row * GROUPS
                    scales = scales + (_load_scales(begin_scale, scale_place * more, GROUPS, NATIVE),)
                else:
                    scales = scales + ((),)
        found = meet(sums + others, PARTS + len(others), WARPS, NATIVE)
        result = found[0] * ends[1][0]
        up = found[PARTS - 1] * ends[1][1]
        if NORM == "rms":
            factor = 1.0 / tl.sqrt(found[PARTS] / K + eps)
            result *= factor
            up *= factor
        store_rows(y, ends[0], left, rows, N, result, up, ACTIVATION, GATED)
        rows += ROWS
        if STEPS > 1:
            ends = load_ends(scale, None, bias, rows, N, GATED, 1 if GROUPED else 0, False)
            left = load_at(residual, rows, N)
