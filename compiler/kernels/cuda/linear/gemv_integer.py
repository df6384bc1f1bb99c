"""One token times a weight of 4- or 8-bit integers, by dp4a: products of bytes, four a lane and instruction.

The token becomes 16-bit fixed point inside the kernel, with one scale for each run of columns that 16 bytes of a row
of W hold (32 columns of 4 bits, 16 of 8 bits): two digits of base 256, each a signed byte. This costs 2^-16 of the
run's largest value, less than bfloat16 has lost, and products and sums of a run are exact in 32 bits. Four weights
cost two dp4a where floats would cost as many conversions and multiplications as there are weights. Nibbles become
bytes times 16 by one AND and one shift; the 16 is taken out with the token's scale.

The first tile is asked for before the wait for x, as in gemv_float.
"""

from __future__ import annotations

import triton
import triton.language as tl

from optc.compiler.kernels.cuda.linear.integer_rows import RUN, load_row
from optc.compiler.kernels.cuda.primitives import (
    LEVELS,
    SMALLEST,
    dot_bytes,
    layer_statistics,
    let_next_start,
    load_at,
    load_pair,
    load_run,
    nan_maximum,
    quad_digits,
    quad_magnitude,
    quad_square,
    run_values,
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
    loaded, x, norm_weight, norm_bias, runs, mean, inverse, K: tl.constexpr, BITS: tl.constexpr,
    RUNS: tl.constexpr, NORM: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """The token's columns of some runs, `loaded` of x, as digits, in words of four.

    Returns:
        digits: low and high ones, in turn, of each four columns of a run.
        unit [RUNS]: what 1 in the fixed-point numbers of a run, times a weight as dot_bytes gets it, stands for.
        squares [RUNS]: sums of squares before the norm.
    """
    COLUMNS: tl.constexpr = RUN * 32 // BITS
    inside = runs < K // COLUMNS
    places = tl.minimum(runs, K // COLUMNS - 1)
    columns = run_values(loaded, x.dtype.element_ty, COLUMNS, NATIVE)
    gains = columns
    shifts = columns
    if norm_weight is not None:
        gains = run_values(
            load_run(norm_weight, places, COLUMNS, NATIVE), norm_weight.dtype.element_ty, COLUMNS, NATIVE
        )
    if norm_bias is not None:
        shifts = run_values(load_run(norm_bias, places, COLUMNS, NATIVE), norm_bias.dtype.element_ty, COLUMNS, NATIVE)
    squares = tl.zeros([RUNS], tl.float32)
    largest = tl.zeros([RUNS], tl.float32)
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
def _row_product(
    row, digits, unit, token_sums, BITS: tl.constexpr, GROUPED: tl.constexpr, ZERO: tl.constexpr, NATIVE: tl.constexpr
):
    """Products of a row of W (see `load_row`) with the token, summed over each run: float32 [RUNS]."""
    total = _run_dots(row, digits, BITS, NATIVE)
    if ZERO:
        total -= row[5] * token_sums
    if GROUPED:
        return total.to(tl.float32) * (row[4].to(tl.float32) * unit)
    else:
        return total.to(tl.float32) * unit


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
def _load_tile(
    w, scale, zero, N, rows_left, run, turn, there, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr, RUNS: tl.constexpr, GATED: tl.constexpr, WHOLE: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """BLOCK_N rows of a turn, and where there is a gate their up rows behind them, each as `load_row` has it.

    `w`, `scale` and `zero` point at the program's first row. Rows past the last one are that one again; with WHOLE,
    where there are none, a row is at a distance that the compiler knows. Runs past the last one are that one again,
    and the token is zero there. Where `there` is 0, all is the first run of the first rows.
    """
    ROW_RUNS: tl.constexpr = K * BITS // (32 * RUN)
    ROW_GROUPS: tl.constexpr = K // GROUP if GROUP > 0 else 0
    if ROW_RUNS <= RUNS:
        runs = tl.minimum(run, ROW_RUNS - 1) * there
        row = turn * there * BLOCK_N
    else:
        runs = tl.minimum(run + turn * RUNS, ROW_RUNS - 1) * there
        row = 0
    tile = ()
    for part in tl.static_range(2 if GATED else 1):
        if part == 1:
            w += N.to(tl.int64) * (ROW_RUNS * RUN)
            if GROUP > 0:
                scale += N * ROW_GROUPS
                if zero is not None:
                    zero += N * ROW_GROUPS
        for i in tl.static_range(BLOCK_N):
            if WHOLE:
                tile = tile + (load_row(w, scale, zero, runs, row, i, K, BITS, GROUP, NATIVE),)
            else:
                place = tl.minimum(row + i, rows_left - 1)
                tile = tile + (load_row(w, scale, zero, runs, place, 0, K, BITS, GROUP, NATIVE),)
    return tile


@triton.jit
def _load_ends(scale, zero, bias, rows, N, GATED: tl.constexpr, GROUP: tl.constexpr, ROW_ZERO: tl.constexpr):
    """What the results of some rows are multiplied and shifted by, as pairs (of the gate, of the up row)."""
    biases = load_pair(bias, rows, N, GATED)
    if GROUP == 0:
        factors = load_pair(scale, rows, N, GATED)
    else:
        factors = (1.0, 1.0)
    if ROW_ZERO:
        return biases, factors, load_pair(zero, rows, N, GATED)
    else:
        return biases, factors, (0.0, 0.0)


@triton.jit
def _finish(
    y, sums, ends, left, rows, N, token_total, squares, eps, K: tl.constexpr, NORM: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, RUNS: tl.constexpr, WARPS: tl.constexpr,
    NATIVE: tl.constexpr, ROW_ZERO: tl.constexpr,
):  # fmt: skip
    """Sum ROWS rows, and as many up rows behind them, over the runs; then what follows the product.

    `rows` [32] are those of `sum_rows`; token_total and squares [RUNS] are the token's and belong to all of them.
    """
    values = (sums[:ROWS], sums[ROWS:]) if GATED else (sums,)
    others = ()
    if NORM == "rms":
        others = others + (squares,)
    if ROW_ZERO:
        others = others + (token_total,)
    found = sum_rows(values, others, ROWS, RUNS, WARPS, NATIVE)
    PARTS: tl.constexpr = 2 if GATED else 1
    result = found[0]
    up = found[PARTS - 1]
    if ROW_ZERO:
        token_sum = found[PARTS + 1] if NORM == "rms" else found[PARTS]
        result -= ends[2][0] * token_sum
        up -= ends[2][1] * token_sum
    result *= ends[1][0]
    up *= ends[1][1]
    if NORM == "rms":  # the factor of the whole token
        factor = 1.0 / tl.sqrt(found[PARTS] / K + eps)
        result *= factor
        up *= factor
    store_rows(y, ends[0], left, rows, N, result, up, ACTIVATION, GATED)


@triton.jit
def gemv_integer(
    x, w, scale, zero, norm_weight, norm_bias, bias, residual, y, M, N, eps,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr,
    GATED: tl.constexpr, BLOCK_N: tl.constexpr, STEPS: tl.constexpr, WORDS: tl.constexpr, DEPTH: tl.constexpr,
    UNROLLED: tl.constexpr, WHOLE: tl.constexpr, STATISTICS: tl.constexpr, WARPS: tl.constexpr, NATIVE: tl.constexpr,
    EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """See `fused_linear`; w is int32 [N, K * BITS / 32], N counts results, GROUP 0 means a scale per row.

    A program takes one turn after the other: of BLOCK_N rows each, STEPS of them, or, where a row is longer than WORDS, of
    WORDS words of the same rows. The tiles of DEPTH turns are on their way; in the last turns all threads ask for the same
    words, which nobody reads: a load that may be left out would end a block of instructions.

    UNROLLED: the turns stand one after the other in the code, and a load goes out as soon as registers are free for it.

    Programs of the M tokens of a block are neighbours. WHOLE: N is a multiple of a program's BLOCK_N * STEPS rows.
    STATISTICS is the block of the passes over x that find mean and variance, WARPS what the program runs on.
    """
    ROW_WORDS: tl.constexpr = K * BITS // 32
    ROW_GROUPS: tl.constexpr = K // GROUP if GROUP > 0 else 0
    COLUMNS: tl.constexpr = RUN * 32 // BITS
    RUNS: tl.constexpr = WORDS // RUN
    ROW_RUNS: tl.constexpr = ROW_WORDS // RUN
    CHUNKS: tl.constexpr = (ROW_WORDS + WORDS - 1) // WORDS
    TURNS: tl.constexpr = CHUNKS * STEPS
    PARTS: tl.constexpr = 2 if GATED else 1
    ROW_ZERO: tl.constexpr = zero is not None and GROUP == 0
    GROUP_ZERO: tl.constexpr = zero is not None and GROUP > 0
    tl.static_assert(CHUNKS == 1 or STEPS == 1)
    let_next_start(PDL and EARLY)
    token = tl.program_id(0) % M
    block = tl.program_id(0) // M
    first_row = block * (BLOCK_N * STEPS)
    x += token.to(tl.int64) * K
    y += token.to(tl.int64) * N
    if residual is not None:
        residual += token.to(tl.int64) * N
    rows_left = N - first_row
    own = w + first_row.to(tl.int64) * ROW_WORDS
    own_scale = scale
    own_zero = zero
    if GROUP > 0:
        own_scale += first_row * ROW_GROUPS
        if zero is not None:
            own_zero += first_row * ROW_GROUPS
    run = tl.arange(0, RUNS)
    tiles = ()
    for turn in tl.static_range(DEPTH):
        if turn < TURNS:
            tiles = tiles + (
                _load_tile(
                    own, own_scale, own_zero, N, rows_left, run, turn, 1,
                    K, BITS, GROUP, BLOCK_N, RUNS, GATED, WHOLE, NATIVE,
                ),
            )  # fmt: skip
    rows = first_row + tl.arange(0, 32) * BLOCK_N // 32
    ends = _load_ends(scale, zero, bias, rows, N, GATED, GROUP, ROW_ZERO)
    let_next_start(PDL)
    wait_for_producer(PDL)
    loaded = load_run(x, tl.minimum(run, ROW_RUNS - 1), COLUMNS, NATIVE)
    left = load_at(residual, rows, N)
    if NORM == "layer":
        mean, inverse = layer_statistics(x, eps, K, STATISTICS)
    else:
        mean, inverse = 0.0, 1.0
    squares = tl.zeros([RUNS], tl.float32)
    token_total = tl.zeros([RUNS], tl.float32)
    sums = ()
    if CHUNKS == 1:  # digits stay in registers
        digits, unit, squares = _fixed_point(
            loaded, x, norm_weight, norm_bias, run, mean, inverse, K, BITS, RUNS, NORM, NATIVE
        )
        token_sums = _token_sums(digits, BITS, RUNS, NATIVE)
        token_total = token_sums.to(tl.float32) * unit
    else:
        for _ in tl.static_range(BLOCK_N * PARTS):
            sums = sums + (tl.zeros([RUNS], tl.float32),)
    for turn in tl.range(0, TURNS, disallow_acc_multi_buffer=True, loop_unroll_factor=TURNS if UNROLLED else 1):
        tile = tiles[0]
        tiles = tiles[1:]
        if CHUNKS > 1:
            digits, unit, chunk_squares = _fixed_point(
                loaded, x, norm_weight, norm_bias, run + turn * RUNS, mean, inverse, K, BITS, RUNS, NORM, NATIVE
            )
            token_sums = _token_sums(digits, BITS, RUNS, NATIVE)
            squares += chunk_squares
            token_total += token_sums.to(tl.float32) * unit
            loaded = load_run(x, tl.minimum(run + (turn + 1) * RUNS, ROW_RUNS - 1), COLUMNS, NATIVE)
        products = ()
        for i in tl.static_range(BLOCK_N * PARTS):
            products = products + (
                _row_product(tile[i], digits, unit, token_sums, BITS, GROUP > 0, GROUP_ZERO, NATIVE),
            )
        if TURNS > DEPTH:
            more = tl.minimum(tl.maximum(TURNS - DEPTH - turn, 0), 1)  # in the interpreter turn is a Python number
            tiles = tiles + (
                _load_tile(
                    own, own_scale, own_zero, N, rows_left, run, turn + DEPTH, more,
                    K, BITS, GROUP, BLOCK_N, RUNS, GATED, WHOLE, NATIVE,
                ),
            )  # fmt: skip
        else:
            tiles = tiles + (tile,)
        if CHUNKS == 1:
            _finish(
                y, products, ends, left, rows, N, token_total, squares, eps, K, NORM, ACTIVATION, GATED,
                BLOCK_N, RUNS, WARPS, NATIVE, ROW_ZERO,
            )  # fmt: skip
            rows += BLOCK_N
            if STEPS > 1:
                ends = _load_ends(scale, zero, bias, rows, N, GATED, GROUP, ROW_ZERO)
                left = load_at(residual, rows, N)
        else:
            sums = _added(sums, products, BLOCK_N * PARTS)
    if CHUNKS > 1:
        _finish(
            y, sums, ends, left, rows, N, token_total, squares, eps, K, NORM, ACTIVATION, GATED,
            BLOCK_N, RUNS, WARPS, NATIVE, ROW_ZERO,
        )  # fmt: skip
