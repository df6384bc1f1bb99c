"""One token times a weight of 4- or 8-bit integers, by dp4a: products of bytes, four a lane and instruction.

The token becomes 16-bit fixed point inside the kernel, with one scale for each run of columns that 16 bytes of a row
of W hold (32 columns of 4 bits, 16 of 8 bits): two digits of base 256, each a signed byte. This costs 2^-16 of the
run's largest value, less than bfloat16 has lost, and products and sums of a run are exact in 32 bits. Four weights
cost two dp4a where floats would cost as many conversions and multiplications as there are weights. Nibbles become
bytes times 16 by one AND and one shift; the 16 is taken out with the token's scale.

The order of tiles is that of gemv_float: DEPTH tiles are on their way, the first before the wait for x.
"""

from __future__ import annotations

import triton
import triton.language as tl

from optc.compiler.kernels.cuda.linear.integer_rows import RUN, load_tile
from optc.compiler.kernels.cuda.primitives import (
    LEVELS,
    SMALLEST,
    dot_bytes,
    layer_statistics,
    let_next_start,
    load_run,
    nan_maximum,
    quad_digits,
    quad_magnitude,
    quad_square,
    store_rows,
    wait_for_producer,
)
from optc.compiler.kernels.cuda.sums import sum_rows


@triton.jit
def _through_norm(
    column, gain, shift, mean, inverse, norm_weight, norm_bias, NORM: tl.constexpr
):  # fmt: skip
    """An element of each run through what of the norm does not need the whole token."""
    if NORM == "layer":
        column = (column - mean) * inverse
    if norm_weight is not None:
        column *= gain
    if norm_bias is not None:
        column += shift
    return column


@triton.jit
def _fixed_point(
    x, norm_weight, norm_bias, mean, inverse, CHUNK: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr,
    WORDS: tl.constexpr, NORM: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Columns of a chunk as digits, in words of four.

    Returns:
        digits: low and high ones, in turn, of each four columns of a run.
        unit [RUNS]: what 1 in the fixed-point numbers of a run, times a weight as dot_bytes gets it, stands for.
        squares [RUNS]: sums of squares before the norm.
    """
    COLUMNS: tl.constexpr = RUN * 32 // BITS
    runs = tl.arange(0, WORDS // RUN) + CHUNK * (WORDS // RUN)
    inside = runs < K // COLUMNS
    runs = tl.minimum(runs, K // COLUMNS - 1)
    columns = load_run(x, runs, COLUMNS, NATIVE)
    gains = columns
    shifts = columns
    if norm_weight is not None:
        gains = load_run(norm_weight, runs, COLUMNS, NATIVE)
    if norm_bias is not None:
        shifts = load_run(norm_bias, runs, COLUMNS, NATIVE)
    squares = tl.zeros([WORDS // RUN], tl.float32)
    largest = tl.zeros([WORDS // RUN], tl.float32)
    normed = ()
    for i in tl.static_range(COLUMNS // 4):
        quad = ()
        for j in tl.static_range(4):
            column = columns[4 * i + j]
            quad = quad + (
                _through_norm(column, gains[4 * i + j], shifts[4 * i + j], mean, inverse, norm_weight, norm_bias, NORM),
            )
        squares += quad_square((columns[4 * i], columns[4 * i + 1], columns[4 * i + 2], columns[4 * i + 3]))
        largest = nan_maximum(largest, quad_magnitude(quad))
        normed = normed + quad
    factor = LEVELS / nan_maximum(largest, SMALLEST)
    unit = largest * (1.0 / (LEVELS * 16.0) if BITS == 4 else 1.0 / LEVELS)
    digits = ()
    for i in tl.static_range(COLUMNS // 4):
        quad = (normed[4 * i], normed[4 * i + 1], normed[4 * i + 2], normed[4 * i + 3])
        digits = digits + quad_digits(quad, factor, NATIVE)
    return digits, tl.where(inside, unit, 0.0), tl.where(inside, squares, 0.0)


@triton.jit
def _run_dots(words, digits, BITS: tl.constexpr, NATIVE: tl.constexpr):
    """Sums of weights times fixed-point numbers over each run, int32; of 4 bits sixteen times that."""
    low = tl.zeros_like(words[0])
    high = tl.zeros_like(words[0])
    for i in tl.static_range(RUN):
        if BITS == 4:  # 0xF0F0F0F0; columns 4i to 4i + 3 are low nibbles, those 16 further high ones
            first = (words[i] << 4) & -252645136
            second = words[i] & -252645136
            low = dot_bytes(first, digits[2 * i], low, NATIVE)
            high = dot_bytes(first, digits[2 * i + 1], high, NATIVE)
            low = dot_bytes(second, digits[2 * i + 8], low, NATIVE)
            high = dot_bytes(second, digits[2 * i + 9], high, NATIVE)
        else:
            low = dot_bytes(words[i], digits[2 * i], low, NATIVE)
            high = dot_bytes(words[i], digits[2 * i + 1], high, NATIVE)
    return high * 256 + low


@triton.jit
def _row_product(row, digits, unit, token_sums, BITS: tl.constexpr, ZERO: tl.constexpr, NATIVE: tl.constexpr):
    """Products of a row of W with the token, summed over each run: float32 [RUNS]."""
    words, scales, zeros = row
    total = _run_dots(words, digits, BITS, NATIVE)
    if ZERO:
        total -= zeros * token_sums
    return total.to(tl.float32) * (scales * unit)


@triton.jit
def _token_sums(digits, BITS: tl.constexpr, RUNS: tl.constexpr, NATIVE: tl.constexpr):
    """Sums of the fixed-point numbers of each run [RUNS], as often as a weight of 1 is worth in `_run_dots`."""
    ones = tl.full([RUNS], 0x10101010 if BITS == 4 else 0x01010101, tl.int32)
    low = tl.zeros_like(ones)
    high = tl.zeros_like(ones)
    for i in tl.static_range(32 // BITS):
        low = dot_bytes(ones, digits[2 * i], low, NATIVE)
        high = dot_bytes(ones, digits[2 * i + 1], high, NATIVE)
    return high * 256 + low


@triton.jit
def _added(values, others, COUNT: tl.constexpr):
    """The sums of the tensors of two tuples."""
    found = ()
    for i in tl.static_range(COUNT):
        found = found + (values[i] + others[i],)
    return found


@triton.jit
def gemv_integer(
    x, w, scale, zero, norm_weight, norm_bias, bias, residual, y, M, N, eps,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr,
    GATED: tl.constexpr, BLOCK_N: tl.constexpr, STEPS: tl.constexpr, WORDS: tl.constexpr, DEPTH: tl.constexpr,
    WHOLE: tl.constexpr, STATISTICS: tl.constexpr, WARPS: tl.constexpr, NATIVE: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """See `fused_linear`; w is int32 [N, K * BITS / 32], N counts results, GROUP 0 means a scale per row.

    Programs of the M tokens of a block are neighbours. WHOLE: N is a multiple of a program's BLOCK_N * STEPS rows.
    STATISTICS is the block of the passes over x that find mean and variance, WARPS what the program runs on.
    """
    CHUNKS: tl.constexpr = (K * BITS // 32 + WORDS - 1) // WORDS
    TILES: tl.constexpr = CHUNKS * STEPS
    RUNS: tl.constexpr = WORDS // RUN
    ROWS: tl.constexpr = BLOCK_N * STEPS
    PARTS: tl.constexpr = 2 if GATED else 1
    ROW_ZERO: tl.constexpr = zero is not None and GROUP == 0
    GROUP_ZERO: tl.constexpr = zero is not None and GROUP > 0
    let_next_start(PDL and EARLY)
    token = tl.program_id(0) % M
    first_row = (tl.program_id(0) // M) * ROWS
    x += token.to(tl.int64) * K
    y += token.to(tl.int64) * N
    if residual is not None:
        residual += token.to(tl.int64) * N
    rows_left = N - first_row
    w += first_row.to(tl.int64) * (K * BITS // 32)
    group_scale = scale
    group_zero = zero
    if GROUP > 0:
        group_scale += first_row * (K // GROUP)
        if zero is not None:
            group_zero += first_row * (K // GROUP)
    tiles = ()
    for j in tl.static_range(DEPTH):
        if j < TILES:
            tiles = tiles + (
                load_tile(
                    w, group_scale, group_zero, N, rows_left, j, K, BITS, GROUP, BLOCK_N, RUNS, GATED, WHOLE, NATIVE
                ),
            )
    let_next_start(PDL)
    wait_for_producer(PDL)
    if NORM == "layer":
        mean, inverse = layer_statistics(x, eps, K, STATISTICS)
    else:
        mean, inverse = 0.0, 1.0
    squares = tl.zeros([RUNS], tl.float32)
    token_total = tl.zeros([RUNS], tl.float32)
    sums = ()
    ups = ()
    for j in tl.static_range(TILES):
        tile = tiles[0]
        tiles = tiles[1:]
        if j + DEPTH < TILES:
            tiles = tiles + (
                load_tile(
                    w,
                    group_scale,
                    group_zero,
                    N,
                    rows_left,
                    j + DEPTH,
                    K,
                    BITS,
                    GROUP,
                    BLOCK_N,
                    RUNS,
                    GATED,
                    WHOLE,
                    NATIVE,
                ),
            )
        if j == 0 or CHUNKS > 1:  # digits stay in registers where one tile holds all of x
            digits, unit, chunk_squares = _fixed_point(
                x, norm_weight, norm_bias, mean, inverse, j % CHUNKS, K, BITS, WORDS, NORM, NATIVE
            )
            token_sums = _token_sums(digits, BITS, RUNS, NATIVE)
            if j < CHUNKS:
                squares += chunk_squares
                token_total += token_sums.to(tl.float32) * unit
        products = ()
        for i in tl.static_range(BLOCK_N * PARTS):
            products = products + (_row_product(tile[i], digits, unit, token_sums, BITS, GROUP_ZERO, NATIVE),)
        if CHUNKS > 1 and j > 0:  # then there is one step
            sums = _added(sums, products[:BLOCK_N], BLOCK_N)
            ups = _added(ups, products[BLOCK_N:], BLOCK_N * (PARTS - 1))
        else:
            sums = sums + products[:BLOCK_N]
            ups = ups + products[BLOCK_N:]
    rows = first_row + tl.arange(0, ROWS)
    result = sum_rows(sums + ups, ROWS * PARTS, RUNS, WARPS, NATIVE)
    up_result = result
    if GATED:
        result, up_result = tl.split(tl.trans(tl.reshape(result, [2, ROWS])))
    if GROUP == 0:
        held = tl.minimum(rows, N - 1)
        if ROW_ZERO:
            result -= tl.load(zero + held).to(tl.float32) * tl.sum(token_total, 0)
        result *= tl.load(scale + held).to(tl.float32)
        if GATED:
            if ROW_ZERO:
                up_result -= tl.load(zero + N + held).to(tl.float32) * tl.sum(token_total, 0)
            up_result *= tl.load(scale + N + held).to(tl.float32)
    if NORM == "rms":  # the factor of the whole token
        inverse = 1.0 / tl.sqrt(tl.sum(squares, 0) / K + eps)
        result *= inverse
        up_result *= inverse
    store_rows(y, bias, residual, rows, N, result, up_result, ACTIVATION, GATED)
