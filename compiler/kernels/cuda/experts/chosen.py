"""The choice of experts; then two launches: what each chosen expert of each token makes, and their weighted sum."""

import triton
import triton.language as tl

from optc.compiler.kernels.cuda.primitives import activate, wait_for_producer


@triton.jit
def multiply(
    w, source, rows, N, shift, K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows of w [N, K] from `shift` rows on, times source [K]."""
    columns = tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    places = (rows + shift).to(tl.int64)[:, None] * K + columns[None, :]
    for start in range(0, K, BLOCK_K):
        there = start + columns < K
        values = tl.load(source + start + columns, mask=there, other=0.0).to(tl.float32)
        weights = tl.load(w + places + start, mask=(rows < N)[:, None] & there[None, :], other=0.0)
        total += weights.to(tl.float32) * values[None, :]
    return tl.sum(total, 1)


@triton.jit
def expert_hidden(
    x, up, indices, hidden, N, SLOTS: tl.constexpr, K: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """hidden[pair, rows] = act(up[e] @ x) [* the other half], of the expert e of a pair of token and slot."""
    pair = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    wait_for_producer(PDL)
    expert = tl.load(indices + pair).to(tl.int64)
    w = up + expert * N * K * (2 if GATED else 1)
    source = x + (pair // SLOTS).to(tl.int64) * K
    made = activate(multiply(w, source, rows, N, 0, K, BLOCK_N, BLOCK_K), ACTIVATION)
    if GATED:
        made *= multiply(w, source, rows, N, N, K, BLOCK_N, BLOCK_K)
    tl.store(hidden + pair.to(tl.int64) * N + rows, made, mask=rows < N)


@triton.jit
def expert_sum(
    hidden, down, indices, weights, residual, y, N, SLOTS: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y[token, rows] = sum over slots of weight * (down[e] @ hidden) + residual."""
    token = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    places = token.to(tl.int64) * N + rows
    total = tl.zeros([BLOCK_N], tl.float32)
    wait_for_producer(PDL)
    for slot in tl.static_range(SLOTS):
        pair = token * SLOTS + slot
        expert = tl.load(indices + pair).to(tl.int64)
        share = tl.load(weights + pair).to(tl.float32)
        source = hidden + pair.to(tl.int64) * K
        total += share * multiply(down + expert * N * K, source, rows, N, 0, K, BLOCK_N, BLOCK_K)
    if residual is not None:
        total += tl.load(residual + places, mask=rows < N, other=0.0).to(tl.float32)
    tl.store(y + places, total.to(y.dtype.element_ty), mask=rows < N)


@triton.jit
def choose(
    logits, weights, indices, row_stride, E: tl.constexpr, SLOTS: tl.constexpr, NORMALIZED: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_SLOTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The largest logits of a token, one after the other. NaN makes the weights NaN, and never an index beyond E."""
    token = tl.program_id(0).to(tl.int64)
    experts, slots = tl.arange(0, BLOCK), tl.arange(0, BLOCK_SLOTS)
    wait_for_producer(PDL)
    left = tl.load(logits + token * row_stride + experts, mask=experts < E, other=-float("inf")).to(tl.float32)
    top = tl.max(left, 0)
    total = tl.sum(tl.exp(left - top), 0)
    shares = tl.zeros([BLOCK_SLOTS], tl.float32)
    places = tl.zeros([BLOCK_SLOTS], tl.int32)
    for slot in tl.static_range(SLOTS):
        best = tl.max(left, 0)
        place = tl.minimum(tl.min(tl.where(left == best, experts, BLOCK), 0), E - 1)
        shares = tl.where(slots == slot, tl.exp(best - top) / total, shares)
        places = tl.where(slots == slot, place, places)
        left = tl.where(experts == place, -float("inf"), left)
    if NORMALIZED:
        shares /= tl.sum(shares, 0)
    tl.store(weights + token * SLOTS + slots, shares, mask=slots < SLOTS)
    tl.store(indices + token * SLOTS + slots, places.to(tl.int64), mask=slots < SLOTS)
