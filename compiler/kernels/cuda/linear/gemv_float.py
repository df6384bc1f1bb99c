"""One token times a weight of floats (bfloat16, float16, float32, E4M3): each weight is read once, through registers.

A program makes STEPS * BLOCK_N results, one tile [BLOCK_N, BLOCK_K] of W after the other, and has DEPTH tiles under
way. The first DEPTH are asked for before the wait for the producer of x, so that a chain of such kernels keeps the
memory busy across their borders.
"""

from __future__ import annotations

import triton
import triton.language as tl

from optc.compiler.kernels.cuda.primitives import (
    layer_statistics,
    let_next_start,
    load_at,
    load_pair,
    store_rows,
    wait_for_producer,
)


@triton.jit
def _load_tile(
    w, N, first_row, TILE: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GATED: tl.constexpr,
):  # fmt: skip
    """Tile number TILE of a program, of the gate's rows and, where there is a gate, of the up rows."""
    CHUNKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    rows = tl.minimum(first_row + (TILE // CHUNKS) * BLOCK_N + tl.arange(0, BLOCK_N), N - 1)
    columns = tl.arange(0, BLOCK_K) + (TILE % CHUNKS) * BLOCK_K
    places = w + rows.to(tl.int64)[:, None] * K + columns[None, :]
    if (TILE % CHUNKS + 1) * BLOCK_K <= K:
        gate = tl.load(places, eviction_policy="evict_first")
        up = tl.load(places + N.to(tl.int64) * K, eviction_policy="evict_first") if GATED else gate
    else:
        inside = (columns < K)[None, :]
        gate = tl.load(places, mask=inside, other=0.0, eviction_policy="evict_first")
        if GATED:
            up = tl.load(places + N.to(tl.int64) * K, mask=inside, other=0.0, eviction_policy="evict_first")
        else:
            up = gate
    return gate, up


@triton.jit
def gemv_float(
    x, w, scale, norm_weight, norm_bias, bias, residual, y, M, N, eps,
    K: tl.constexpr, NORM: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    BLOCK_N: tl.constexpr, STEPS: tl.constexpr, BLOCK_K: tl.constexpr, DEPTH: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """See `fused_linear`; N counts results, scale is [N] or None. Programs of the M tokens of a block are neighbours."""
    CHUNKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    TILES: tl.constexpr = CHUNKS * STEPS
    let_next_start(PDL and EARLY)
    token = tl.program_id(0) % M
    first_row = (tl.program_id(0) // M) * (BLOCK_N * STEPS)
    x += token * K
    y += token.to(tl.int64) * N
    if residual is not None:
        residual += token.to(tl.int64) * N
    block = tl.arange(0, BLOCK_K)
    tiles = (_load_tile(w, N, first_row, 0, K, BLOCK_N, BLOCK_K, GATED),)
    for j in tl.static_range(1, DEPTH):
        if j < TILES:
            tiles = tiles + (_load_tile(w, N, first_row, j, K, BLOCK_N, BLOCK_K, GATED),)
    if CHUNKS == 1:
        inside = block < K
        if norm_weight is not None:
            gain = tl.load(norm_weight + block, mask=inside, other=0.0).to(tl.float32)
        if norm_bias is not None:
            shift = tl.load(norm_bias + block, mask=inside, other=0.0).to(tl.float32)
    scales = ()
    biases = ()
    for i in tl.static_range(STEPS):
        rows = first_row + i * BLOCK_N + tl.arange(0, BLOCK_N)
        scales = scales + (load_pair(scale, rows, N, GATED),)
        biases = biases + (load_pair(bias, rows, N, GATED),)
    let_next_start(PDL)
    wait_for_producer(PDL)
    left = ()
    for i in tl.static_range(STEPS):
        left = left + (load_at(residual, first_row + i * BLOCK_N + tl.arange(0, BLOCK_N), N),)
    if NORM == "layer":
        mean, inverse = layer_statistics(x, eps, K, BLOCK_K)
    squares = tl.zeros([BLOCK_K], tl.float32)
    for j in tl.static_range(TILES):
        gate, up = tiles[0]
        tiles = tiles[1:]
        if j + DEPTH < TILES:
            tiles = tiles + (_load_tile(w, N, first_row, j + DEPTH, K, BLOCK_N, BLOCK_K, GATED),)
        if j == 0 or CHUNKS > 1:  # x stays in registers where one tile holds all of it
            columns = block + (j % CHUNKS) * BLOCK_K
            inside = columns < K
            values = tl.load(x + columns, mask=inside, other=0.0).to(tl.float32)
            if CHUNKS > 1:
                if norm_weight is not None:
                    gain = tl.load(norm_weight + columns, mask=inside, other=0.0).to(tl.float32)
                if norm_bias is not None:
                    shift = tl.load(norm_bias + columns, mask=inside, other=0.0).to(tl.float32)
            if NORM == "rms" and j < CHUNKS:
                squares += values * values
            if NORM == "layer":
                values = (values - mean) * inverse
            if norm_weight is not None:
                values *= gain
            if norm_bias is not None:
                values += shift
        products = gate.to(tl.float32) * values[None, :]
        up_products = up.to(tl.float32) * values[None, :] if GATED else products
        # The first are not added to zeros: then a thread's multiplication and its next addition are one instruction.
        if j % CHUNKS == 0:
            sums = products
            up_sums = up_products
        else:
            sums += products
            if GATED:
                up_sums += up_products
        if j % CHUNKS == CHUNKS - 1:
            if NORM == "rms" and j == CHUNKS - 1:
                inverse = 1.0 / tl.sqrt(tl.sum(squares, 0) / K + eps)
            rows = first_row + (j // CHUNKS) * BLOCK_N + tl.arange(0, BLOCK_N)
            result = tl.sum(sums, 1)
            up_result = tl.sum(up_sums, 1)
            if NORM == "rms":  # the factor of the whole token, known only now
                result *= inverse
                up_result *= inverse
            if scale is not None:
                result *= scales[j // CHUNKS][0]
                up_result *= scales[j // CHUNKS][1]
            store_rows(y, biases[j // CHUNKS], left[j // CHUNKS], rows, N, result, up_result, ACTIVATION, GATED)
            sums = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
            up_sums = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
