"""A few tokens times a weight of floats (E4M3, or the tokens' own type) on the tensor cores."""

from __future__ import annotations

import triton
import triton.language as tl

from optc.compiler.kernels.cuda.primitives import bring_rows, let_next_start, store_block, wait_for_producer


@triton.jit
def _block_product(
    x, w, rows, tokens, start, total, K: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """total + the products of BLOCK_K columns from `start` on: float32 [BLOCK_N, BLOCK_M]."""
    columns = start + tl.arange(0, BLOCK_K)
    places = w + rows.to(tl.int64)[:, None] * K + columns[None, :]
    if K % BLOCK_K == 0:
        weight = tl.load(places, eviction_policy="evict_first")
        values = tl.load(x + tokens[None, :] * K + columns[:, None])
    else:
        weight = tl.load(places, mask=(columns < K)[None, :], other=0.0, eviction_policy="evict_first")
        values = tl.load(x + tokens[None, :] * K + columns[:, None], mask=(columns < K)[:, None], other=0.0)
    precision: tl.constexpr = "ieee" if x.dtype.element_ty == tl.float32 else "tf32"
    return tl.dot(weight.to(x.dtype.element_ty), values, total, input_precision=precision)


@triton.jit
def product_float(
    x, w, scale, bias, residual, y, partial, arrivals, M, N,
    K: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr, LINES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y [M, N] of normalized tokens x [M, K]; scale is [N] or None. See product_integer for the other arguments."""
    BLOCKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    block_n = tl.program_id(0)
    part = tl.program_id(1)
    block_m = tl.program_id(2)
    rows = tl.minimum(block_n * BLOCK_N + tl.arange(0, BLOCK_N), N - 1)
    tokens = tl.minimum(block_m * BLOCK_M + tl.arange(0, BLOCK_M), M - 1)
    if PDL and LINES > 0:
        SIZE: tl.constexpr = w.dtype.element_ty.primitive_bitwidth // 8
        begin = part * BLOCKS // SPLIT * (BLOCK_K * SIZE)
        end = tl.minimum((part + 1) * BLOCKS // SPLIT * BLOCK_K, K) * SIZE
        bring_rows(w, rows, begin, end, K * SIZE, LINES)
        if GATED:
            bring_rows(w, rows + N, begin, end, K * SIZE, LINES)
        let_next_start(PDL)
    wait_for_producer(PDL)
    gate = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for block in tl.range(part * BLOCKS // SPLIT, (part + 1) * BLOCKS // SPLIT, num_stages=STAGES):
        gate = _block_product(x, w, rows, tokens, block * BLOCK_K, gate, K, BLOCK_K)
        if GATED:
            up = _block_product(x, w, rows + N, tokens, block * BLOCK_K, up, K, BLOCK_K)
    if scale is not None:
        gate *= tl.load(scale + rows).to(tl.float32)[:, None]
        if GATED:
            up *= tl.load(scale + N + rows).to(tl.float32)[:, None]
    store_block(
        y, bias, residual, partial, arrivals, block_n * BLOCK_N + tl.arange(0, BLOCK_N),
        block_m * BLOCK_M + tl.arange(0, BLOCK_M), None, M, N, gate, up, ACTIVATION, GATED, SPLIT,
    )  # fmt: skip
