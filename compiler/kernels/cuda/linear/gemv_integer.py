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
    load_quad,
    nan_maximum,
    quad_digits,
    quad_magnitude,
    store_rows,
    unpack_quad,
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
def _words(chunk, WORDS: tl.constexpr):
    """Words of a chunk, counted along a row: [RUNS, RUN]."""
    return tl.arange(0, WORDS // RUN)[:, None] * RUN + tl.arange(0, RUN)[None, :] + chunk * WORDS


@triton.jit
def _load_rows(
    w, scale, zero, rows, CHUNK: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    WORDS: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Words of some rows [BLOCK_N, RUNS, RUN], with scales and zero points [BLOCK_N, RUNS] of each run; a scale per
    row comes at the end instead."""
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
    return tl.reshape(q, [rows.shape[0], WORDS // RUN, RUN]), scales, zeros


@triton.jit
def _load_tile(
    w, scale, zero, N, first_row, TILE: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr, WORDS: tl.constexpr, GATED: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """A tile of a program, of the gate's rows and, where there is a gate, of the up rows."""
    CHUNKS: tl.constexpr = (K * BITS // 32 + WORDS - 1) // WORDS
    rows = tl.minimum(first_row + TILE // CHUNKS * BLOCK_N + tl.arange(0, BLOCK_N), N - 1)
    gate = _load_rows(w, scale, zero, rows, TILE % CHUNKS, K, BITS, GROUP, WORDS, NATIVE)
    if GATED:
        up = _load_rows(w, scale, zero, rows + N, TILE % CHUNKS, K, BITS, GROUP, WORDS, NATIVE)
        return gate, up
    else:
        return (gate,)


@triton.jit
def _load_columns(
    pointer, chunk, K: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr, NATIVE: tl.constexpr
):  # fmt: skip
    """Elements of a token or norm where the words of a chunk have their columns: quads of columns [RUNS, RUN] for each
    word, those of low nibbles first."""
    words = _words(chunk, WORDS)
    inside = None if K * BITS // 32 % WORDS == 0 else words < K * BITS // 32
    if BITS == 4:
        quads = words // RUN * (2 * RUN) + words % RUN
        return load_quad(pointer, quads, inside, NATIVE), load_quad(pointer, quads + RUN, inside, NATIVE)
    else:
        return (load_quad(pointer, words, inside, NATIVE),)


@triton.jit
def _load_norm(
    norm_weight, norm_bias, chunk, K: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr, NATIVE: tl.constexpr
):  # fmt: skip
    """Columns of a chunk of the norm's weight and bias; nothing in the place of what there is not."""
    norm = ()
    if norm_weight is not None:
        norm = norm + (_load_columns(norm_weight, chunk, K, BITS, WORDS, NATIVE),)
    if norm_bias is not None:
        norm = norm + (_load_columns(norm_bias, chunk, K, BITS, WORDS, NATIVE),)
    return norm


@triton.jit
def _normalized_quad(columns, norm, INDEX: tl.constexpr, mean, inverse, NORM: tl.constexpr, TYPE: tl.constexpr):
    """Quad number INDEX of a chunk before and after what of the norm does not need the whole token."""
    a, b, c, d = unpack_quad(columns[INDEX], TYPE)
    squares = a * a + b * b + c * c + d * d
    if NORM == "layer":
        a, b, c, d = (a - mean) * inverse, (b - mean) * inverse, (c - mean) * inverse, (d - mean) * inverse
    if len(norm) > 0:
        gain = unpack_quad(norm[0][INDEX], TYPE)
        a, b, c, d = a * gain[0], b * gain[1], c * gain[2], d * gain[3]
    if len(norm) > 1:
        shift = unpack_quad(norm[1][INDEX], TYPE)
        a, b, c, d = a + shift[0], b + shift[1], c + shift[2], d + shift[3]
    return squares, (a, b, c, d)


@triton.jit
def _fixed_point(
    columns, norm, mean, inverse, CHUNK: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, WORDS: tl.constexpr, NORM: tl.constexpr,
    TYPE: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Columns of a chunk as digits.

    Returns:
        digits: (low, high) of the columns in low nibbles (or of all), then of those in high nibbles: four bytes a word.
        unit [RUNS]: what 1 in the fixed-point numbers of a run, times a weight as dot_bytes gets it, stands for.
        squares [RUNS, RUN]: sums of squares before the norm.
    """
    squares, quad = _normalized_quad(columns, norm, 0, mean, inverse, NORM, TYPE)
    magnitude = quad_magnitude(quad)
    if BITS == 4:
        more, other = _normalized_quad(columns, norm, 1, mean, inverse, NORM, TYPE)
        squares += more
        magnitude = nan_maximum(magnitude, quad_magnitude(other))
    if NORM == "layer":  # past the end, columns are not zero after the mean is taken off, and no weights are there
        magnitude = tl.where(_words(CHUNK, WORDS) < K * BITS // 32, magnitude, 0.0)
    largest = tl.reduce(magnitude, 1, nan_maximum)
    factor = LEVELS / nan_maximum(largest, SMALLEST)
    factor = factor[:, None]
    unit = largest * (1.0 / (LEVELS * 16.0) if BITS == 4 else 1.0 / LEVELS)
    digits = quad_digits(quad, factor, NATIVE)
    if BITS == 4:
        digits = digits + quad_digits(other, factor, NATIVE)
    return digits, unit, squares


@triton.jit
def _tile_product(rows, digits, unit, token_sums, BITS: tl.constexpr, ZERO: tl.constexpr, NATIVE: tl.constexpr):
    """Products of a tile of W with the token, summed over each run: float32 [BLOCK_N, RUNS]."""
    q, scales, zeros = rows
    none = tl.zeros_like(q)
    if BITS == 4:
        first, second = (q << 4) & -252645136, q & -252645136  # 0xF0F0F0F0: sixteen times the nibbles
        low = dot_bytes(second, digits[2][None, :, :] + none, none, NATIVE)
        high = dot_bytes(second, digits[3][None, :, :] + none, none, NATIVE)
        low = dot_bytes(first, digits[0][None, :, :] + none, low, NATIVE)
        high = dot_bytes(first, digits[1][None, :, :] + none, high, NATIVE)
    else:
        low = dot_bytes(q, digits[0][None, :, :] + none, none, NATIVE)
        high = dot_bytes(q, digits[1][None, :, :] + none, none, NATIVE)
    total = tl.sum(high * 256 + low, 2)
    if ZERO:
        total -= zeros * token_sums[None, :]
    return total.to(tl.float32) * (scales * unit[None, :])


@triton.jit
def _token_factor(squares, eps, K: tl.constexpr, NORM: tl.constexpr):
    """What results are multiplied with, known only when the whole token is."""
    if NORM == "rms":
        return 1.0 / tl.sqrt(tl.sum(tl.sum(squares, 1), 0) / K + eps)
    else:
        return 1.0


@triton.jit
def _token_sums(digits, BITS: tl.constexpr, NATIVE: tl.constexpr):
    """Sums [RUNS] of the fixed-point numbers, as often as a weight of 1 is worth in `_tile_product`."""
    ones = tl.full(digits[0].shape, 0x10101010 if BITS == 4 else 0x01010101, tl.int32)
    low = dot_bytes(ones, digits[0], tl.zeros_like(ones), NATIVE)
    high = dot_bytes(ones, digits[1], tl.zeros_like(ones), NATIVE)
    if BITS == 4:
        low = dot_bytes(ones, digits[2], low, NATIVE)
        high = dot_bytes(ones, digits[3], high, NATIVE)
    return tl.sum(high * 256 + low, 1)


@triton.jit
def _finish_rows(
    gate_sums, up_sums, first_row, token_total, inverse, scale, zero, bias, residual, y, N, GROUP: tl.constexpr,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Results of some rows from their sums [BLOCK_N, RUNS]; `inverse` is the factor of the token."""
    rows = first_row + tl.arange(0, BLOCK_N)
    held = tl.minimum(rows, N - 1)
    gate = tl.sum(gate_sums, 1)
    up = tl.sum(up_sums, 1)
    if GROUP == 0:
        if zero is not None:
            gate -= tl.load(zero + held).to(tl.float32) * token_total
            if GATED:
                up -= tl.load(zero + N + held).to(tl.float32) * token_total
        gate *= tl.load(scale + held).to(tl.float32)
        if GATED:
            up *= tl.load(scale + N + held).to(tl.float32)
    store_rows(y, bias, residual, rows, N, gate * inverse, up * inverse, ACTIVATION, GATED)


@triton.jit
def gemv_integer(
    x, w, scale, zero, norm_weight, norm_bias, bias, residual, y, M, N, eps,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr,
    GATED: tl.constexpr, BLOCK_N: tl.constexpr, STEPS: tl.constexpr, WORDS: tl.constexpr, DEPTH: tl.constexpr,
    STATISTICS: tl.constexpr, NATIVE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """See `fused_linear`; w is int32 [N, K * BITS / 32], N counts results, GROUP 0 means a scale per row.

    Where a tile is as wide as a row, the digits of the token are made once and stay in registers for STEPS tiles of
    rows; else a program has one block of rows, and makes the digits chunk by chunk. The loops over tiles are unrolled:
    to hand registers on from step to step, a loop would have to wait for what is still on its way to them.

    Programs of the M tokens of a block are neighbours. STATISTICS is the block of the passes over x that find mean
    and variance.
    """
    CHUNKS: tl.constexpr = (K * BITS // 32 + WORDS - 1) // WORDS
    RUNS: tl.constexpr = WORDS // RUN
    GROUP_ZERO: tl.constexpr = zero is not None and GROUP > 0
    TYPE: tl.constexpr = x.dtype.element_ty
    tl.static_assert(CHUNKS == 1 or STEPS == 1)
    index = tl.program_id(0) % M
    first_row = (tl.program_id(0) // M) * (BLOCK_N * STEPS)
    y += index.to(tl.int64) * N
    if residual is not None:
        residual += index.to(tl.int64) * N
    tiles = ()
    for j in tl.static_range(min(DEPTH, CHUNKS * STEPS)):
        tiles = tiles + (_load_tile(w, scale, zero, N, first_row, j, K, BITS, GROUP, BLOCK_N, WORDS, GATED, NATIVE),)
    norm = _load_norm(norm_weight, norm_bias, 0, K, BITS, WORDS, NATIVE)
    x += wait_for_producer(PDL) + index * K
    columns = _load_columns(x, 0, K, BITS, WORDS, NATIVE)
    mean, inverse = 0.0, 1.0
    if NORM == "layer":
        mean, inverse = layer_statistics(x, eps, K, STATISTICS)
    total = tl.zeros([RUNS], tl.float32)
    squares = tl.zeros([RUNS, RUN], tl.float32)
    gate_sums = tl.zeros([BLOCK_N, RUNS], tl.float32)
    up_sums = tl.zeros([BLOCK_N, RUNS], tl.float32)
    for j in tl.static_range(CHUNKS * STEPS):
        tile = tiles[0]
        tiles = tiles[1:]
        if j + DEPTH < CHUNKS * STEPS:
            following = _load_tile(
                w, scale, zero, N, first_row, j + DEPTH, K, BITS, GROUP, BLOCK_N, WORDS, GATED, NATIVE
            )
            tiles = tiles + (following,)
        if j < CHUNKS:
            digits, unit, more = _fixed_point(columns, norm, mean, inverse, j, K, BITS, WORDS, NORM, TYPE, NATIVE)
            if j + 1 < CHUNKS:
                norm = _load_norm(norm_weight, norm_bias, j + 1, K, BITS, WORDS, NATIVE)
                columns = _load_columns(x, j + 1, K, BITS, WORDS, NATIVE)
            token_sums = _token_sums(digits, BITS, NATIVE)
            squares += more
            total += token_sums.to(tl.float32) * unit
            if j == CHUNKS - 1:
                factor = _token_factor(squares, eps, K, NORM)
                token_total = tl.sum(total, 0)
        gate_sums += _tile_product(tile[0], digits, unit, token_sums, BITS, GROUP_ZERO, NATIVE)
        if GATED:
            up_sums += _tile_product(tile[1], digits, unit, token_sums, BITS, GROUP_ZERO, NATIVE)
        if j >= CHUNKS - 1:
            _finish_rows(
                gate_sums, up_sums, first_row + j // CHUNKS * BLOCK_N, token_total, factor, scale, zero, bias, residual,
                y, N, GROUP, ACTIVATION, GATED, BLOCK_N,
            )  # fmt: skip
            gate_sums = tl.zeros([BLOCK_N, RUNS], tl.float32)
            up_sums = tl.zeros([BLOCK_N, RUNS], tl.float32)
