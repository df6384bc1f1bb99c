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

from optc.compiler.kernels.cuda.primitives import (
    LEVELS,
    SMALLEST,
    dot_bytes,
    layer_statistics,
    load_quads,
    nan_maximum,
    quad_digits,
    quad_magnitude,
    store_rows,
    wait_for_producer,
)

RUN = tl.constexpr(4)
"""Words of W whose columns share a scale of the token: 16 bytes, one load of a thread."""


@triton.jit
def _load_scales(places, NATIVE: tl.constexpr):
    """Values as floats in the layout that `places` has.

    Through assembly, since the coalescing pass would choose another layout for a tl.load of these short rows, and
    every use would go through shared memory.
    """
    if NATIVE and places.dtype.element_ty == tl.int8:
        value = tl.inline_asm_elementwise(
            "ld.global.nc.s8 $0, [$1];", "=r,l", [places], dtype=tl.int32, is_pure=True, pack=1
        )
    elif NATIVE and places.dtype.element_ty.primitive_bitwidth == 16:
        value = tl.inline_asm_elementwise(
            "ld.global.nc.u16 $0, [$1];", "=h,l", [places], dtype=places.dtype.element_ty, is_pure=True, pack=1
        )
    else:
        value = tl.load(places)
    return value.to(tl.int32 if places.dtype.element_ty == tl.int8 else tl.float32)


@triton.jit
def _load_rows(
    w, scale, zero, rows, CHUNK: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    WORDS: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Words of some rows, with scales and zero points of each run; a scale per row comes at the end instead."""
    ROW_WORDS: tl.constexpr = K * BITS // 32
    RUN_COLUMNS: tl.constexpr = RUN * 32 // BITS
    words = tl.arange(0, WORDS) + CHUNK * WORDS
    places = w + rows.to(tl.int64)[:, None] * ROW_WORDS + words[None, :]
    if (CHUNK + 1) * WORDS <= ROW_WORDS:
        q = tl.load(places, eviction_policy="evict_first")
    else:
        q = tl.load(places, mask=(words < ROW_WORDS)[None, :], other=0, eviction_policy="evict_first")
    scales = tl.full([1, 1], 1.0, tl.float32)
    zeros = tl.zeros([1, 1], tl.int32)
    if GROUP > 0:
        runs = tl.minimum(tl.arange(0, WORDS // RUN) + CHUNK * (WORDS // RUN), K // RUN_COLUMNS - 1)
        groups = rows[:, None] * (K // GROUP) + (runs // (GROUP // RUN_COLUMNS))[None, :]
        scales = _load_scales(scale + groups, NATIVE)
        if zero is not None:
            zeros = _load_scales(zero + groups, NATIVE)
    return q, scales, zeros


@triton.jit
def _load_tile(
    w, scale, zero, N, first_row, TILE: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr, WORDS: tl.constexpr, GATED: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Tile number TILE of a program, of the gate's rows and, where there is a gate, of the up rows."""
    CHUNKS: tl.constexpr = (K * BITS // 32 + WORDS - 1) // WORDS
    rows = tl.minimum(first_row + (TILE // CHUNKS) * BLOCK_N + tl.arange(0, BLOCK_N), N - 1)
    gate = _load_rows(w, scale, zero, rows, TILE % CHUNKS, K, BITS, GROUP, WORDS, NATIVE)
    if GATED:
        return gate, _load_rows(w, scale, zero, rows + N, TILE % CHUNKS, K, BITS, GROUP, WORDS, NATIVE)
    return gate, gate


@triton.jit
def _through_norm(
    quad, offsets, inside, norm_weight, norm_bias, mean, inverse, NORM: tl.constexpr, WORDS: tl.constexpr
):  # fmt: skip
    """Four elements of each word through what of the norm does not need the whole token."""
    a, b, c, d = quad
    if NORM == "layer":
        a, b, c, d = (a - mean) * inverse, (b - mean) * inverse, (c - mean) * inverse, (d - mean) * inverse
    if norm_weight is not None:
        gain = load_quads(norm_weight, offsets, inside, WORDS)
        a, b, c, d = a * gain[0], b * gain[1], c * gain[2], d * gain[3]
    if norm_bias is not None:
        shift = load_quads(norm_bias, offsets, inside, WORDS)
        a, b, c, d = a + shift[0], b + shift[1], c + shift[2], d + shift[3]
    return a, b, c, d


@triton.jit
def _quad_square(quad):
    return quad[0] * quad[0] + quad[1] * quad[1] + quad[2] * quad[2] + quad[3] * quad[3]


@triton.jit
def _fixed_point(
    x, norm_weight, norm_bias, mean, inverse, CHUNK: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr,
    WORDS: tl.constexpr, NORM: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Columns of a chunk as digits, one pair of words for each quad of columns that a word of W holds.

    Returns:
        digits: (low, high) of the columns in low nibbles (or of all), then of those in high nibbles.
        unit [WORDS / 4]: what 1 in the fixed-point numbers of a run, times a weight as dot_bytes gets it, stands for.
        squares [WORDS]: sums of squares before the norm.
    """
    words = tl.arange(0, WORDS) + CHUNK * WORDS
    inside = words < K * BITS // 32
    RUNS: tl.constexpr = WORDS // RUN
    if BITS == 4:
        offsets = (words // RUN) * 32 + (words % RUN) * 4
        quad, other = load_quads(x, offsets, inside, WORDS), load_quads(x, offsets + 16, inside, WORDS)
        squares = _quad_square(quad) + _quad_square(other)
        quad = _through_norm(quad, offsets, inside, norm_weight, norm_bias, mean, inverse, NORM, WORDS)
        other = _through_norm(other, offsets + 16, inside, norm_weight, norm_bias, mean, inverse, NORM, WORDS)
        magnitude = nan_maximum(quad_magnitude(quad), quad_magnitude(other))
    else:
        offsets = words * 4
        quad = load_quads(x, offsets, inside, WORDS)
        squares = _quad_square(quad)
        quad = _through_norm(quad, offsets, inside, norm_weight, norm_bias, mean, inverse, NORM, WORDS)
        magnitude = quad_magnitude(quad)
    if NORM == "layer":  # columns past the end are not zero after the mean is taken off; they may hold any number
        magnitude = tl.where(inside, magnitude, 0.0)
    largest = tl.reduce(tl.reshape(magnitude, [RUNS, RUN]), 1, nan_maximum)
    factor = LEVELS / nan_maximum(largest, SMALLEST)
    factors = tl.reshape(tl.broadcast_to(factor[:, None], [RUNS, RUN]), [WORDS])
    unit = largest * (1.0 / (LEVELS * 16.0) if BITS == 4 else 1.0 / LEVELS)
    digits = quad_digits(quad, factors, NATIVE)
    if BITS == 4:
        digits = digits + quad_digits(other, factors, NATIVE)
    return digits, unit, squares


@triton.jit
def _run_sums(low, high, RUNS: tl.constexpr):
    """256 * high + low, summed over the words of each run."""
    total = high * 256 + low
    return tl.sum(tl.reshape(total, [total.shape[0], RUNS, RUN]), 2)


@triton.jit
def _tile_product(
    rows, digits, unit, token_sums, BITS: tl.constexpr, RUNS: tl.constexpr, ZERO: tl.constexpr, NATIVE: tl.constexpr
):  # fmt: skip
    """Products of a tile of W with the token, summed over each run: float32 [BLOCK_N, RUNS]."""
    q, scales, zeros = rows
    none = tl.zeros_like(q)
    if BITS == 4:
        first, second = (q << 4) & -252645136, q & -252645136  # 0xF0F0F0F0: sixteen times the nibbles
        low = dot_bytes(second, digits[2][None, :] + none, none, NATIVE)
        high = dot_bytes(second, digits[3][None, :] + none, none, NATIVE)
        low = dot_bytes(first, digits[0][None, :] + none, low, NATIVE)
        high = dot_bytes(first, digits[1][None, :] + none, high, NATIVE)
    else:
        low = dot_bytes(q, digits[0][None, :] + none, none, NATIVE)
        high = dot_bytes(q, digits[1][None, :] + none, none, NATIVE)
    total = _run_sums(low, high, RUNS)
    if ZERO:
        total -= zeros * token_sums[None, :]
    return total.to(tl.float32) * (scales * unit[None, :])


@triton.jit
def _token_sums(digits, BITS: tl.constexpr, RUNS: tl.constexpr, NATIVE: tl.constexpr):
    """Sums of the fixed-point numbers of each run, as often as a weight of 1 is worth in `_tile_product`."""
    ones = tl.full(digits[0].shape, 0x10101010 if BITS == 4 else 0x01010101, tl.int32)
    low = dot_bytes(ones, digits[0], tl.zeros_like(ones), NATIVE)
    high = dot_bytes(ones, digits[1], tl.zeros_like(ones), NATIVE)
    if BITS == 4:
        low = dot_bytes(ones, digits[2], low, NATIVE)
        high = dot_bytes(ones, digits[3], high, NATIVE)
    return tl.sum(tl.reshape(high * 256 + low, [RUNS, RUN]), 1)


@triton.jit
def gemv_integer(
    x, w, scale, zero, norm_weight, norm_bias, bias, residual, y, M, N, eps,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr,
    GATED: tl.constexpr, BLOCK_N: tl.constexpr, STEPS: tl.constexpr, WORDS: tl.constexpr, DEPTH: tl.constexpr,
    STATISTICS: tl.constexpr, NATIVE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """See `fused_linear`; w is int32 [N, K * BITS / 32], N counts results, GROUP 0 means a scale per row.

    Programs of the M tokens of a block are neighbours. STATISTICS is the block of the passes over x that find mean and variance.
    """
    CHUNKS: tl.constexpr = (K * BITS // 32 + WORDS - 1) // WORDS
    TILES: tl.constexpr = CHUNKS * STEPS
    RUNS: tl.constexpr = WORDS // RUN
    ROW_ZERO: tl.constexpr = zero is not None and GROUP == 0
    GROUP_ZERO: tl.constexpr = zero is not None and GROUP > 0
    token = tl.program_id(0) % M
    first_row = (tl.program_id(0) // M) * (BLOCK_N * STEPS)
    x += token * K
    y += token.to(tl.int64) * N
    if residual is not None:
        residual += token.to(tl.int64) * N
    tiles = (_load_tile(w, scale, zero, N, first_row, 0, K, BITS, GROUP, BLOCK_N, WORDS, GATED, NATIVE),)
    for j in tl.static_range(1, DEPTH):
        if j < TILES:
            tiles = tiles + (
                _load_tile(w, scale, zero, N, first_row, j, K, BITS, GROUP, BLOCK_N, WORDS, GATED, NATIVE),
            )
    wait_for_producer(PDL)
    if NORM == "layer":
        mean, inverse = layer_statistics(x, eps, K, STATISTICS)
    else:
        mean, inverse = 0.0, 1.0
    squares = tl.zeros([WORDS], tl.float32)
    token_total = tl.zeros([RUNS], tl.float32)
    sums = tl.zeros([BLOCK_N, RUNS], tl.float32)
    up_sums = tl.zeros([BLOCK_N, RUNS], tl.float32)
    for j in tl.static_range(TILES):
        gate, up = tiles[0]
        tiles = tiles[1:]
        if j + DEPTH < TILES:
            tiles = tiles + (
                _load_tile(w, scale, zero, N, first_row, j + DEPTH, K, BITS, GROUP, BLOCK_N, WORDS, GATED, NATIVE),
            )
        if j == 0 or CHUNKS > 1:  # digits stay in registers where one tile holds all of x
            digits, unit, chunk_squares = _fixed_point(
                x, norm_weight, norm_bias, mean, inverse, j % CHUNKS, K, BITS, WORDS, NORM, NATIVE
            )
            token_sums = _token_sums(digits, BITS, RUNS, NATIVE)
            if j < CHUNKS:
                squares += chunk_squares
                token_total += token_sums.to(tl.float32) * unit
        sums += _tile_product(gate, digits, unit, token_sums, BITS, RUNS, GROUP_ZERO, NATIVE)
        if GATED:
            up_sums += _tile_product(up, digits, unit, token_sums, BITS, RUNS, GROUP_ZERO, NATIVE)
        if j % CHUNKS == CHUNKS - 1:
            if NORM == "rms" and j == CHUNKS - 1:
                inverse = 1.0 / tl.sqrt(tl.sum(squares, 0) / K + eps)
            rows = first_row + (j // CHUNKS) * BLOCK_N + tl.arange(0, BLOCK_N)
            result = tl.sum(sums, 1)
            up_result = tl.sum(up_sums, 1)
            if GROUP == 0:
                held = tl.minimum(rows, N - 1)
                if ROW_ZERO:
                    result -= tl.load(zero + held).to(tl.float32) * tl.sum(token_total, 0)
                result *= tl.load(scale + held).to(tl.float32)
                if GATED:
                    if ROW_ZERO:
                        up_result -= tl.load(zero + N + held).to(tl.float32) * tl.sum(token_total, 0)
                    up_result *= tl.load(scale + N + held).to(tl.float32)
            if NORM == "rms":  # the factor of the whole token, known only now
                result *= inverse
                up_result *= inverse
            store_rows(y, bias, residual, rows, N, result, up_result, ACTIVATION, GATED)
            sums = tl.zeros([BLOCK_N, RUNS], tl.float32)
            up_sums = tl.zeros([BLOCK_N, RUNS], tl.float32)
