"""Queries and keys after norm and rotary embedding as tensors of their own, and new keys and values into the pools: for
attention by a library, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl

from optc.compiler.kernels.cuda.attention.heads import load_heads, rotation
from optc.compiler.kernels.cuda.primitives import wait_for_producer


@triton.jit
def turn_and_write(
    q, k, v, k_pool, v_pool, slot_mapping, position, inv_freq, q_norm, k_norm, turned_q, turned_k,
    q_token, q_head, k_token, k_head, v_token, v_head, k_block, k_slot, k_pool_head, v_block, v_slot, v_pool_head,
    scaling, eps,
    GROUPS: tl.constexpr, HEADS: tl.constexpr, HEAD_ROWS: tl.constexpr, D: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROTATED: tl.constexpr, INTERLEAVED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """turned_q [tokens, GROUPS * HEADS, D] and turned_k [tokens, HEADS, D], a token per program; the pools as `write` does.

    HEADS counts KV heads (HEAD_ROWS: padded to a power of two) and GROUPS the query heads of each, so many of which are
    loaded at a time. Padding (slot -1) is turned as well, since products may meet it; it is not written.
    """
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEAD_ROWS)
    feature = tl.arange(0, WIDTH)[None, :]
    slot = tl.load(slot_mapping + token)
    where = tl.load(position + token + tl.zeros([1], tl.int32))
    cos, sin = rotation(where, inv_freq, scaling, k.dtype.element_ty, WIDTH, ROTATED, INTERLEAVED)
    there = head < HEADS
    mask = there[:, None] & (feature < D)
    wait_for_producer(PDL)
    queries = ()
    for part in tl.static_range(GROUPS):  # all loads are on their way before anything is stored
        row = part * HEADS + head
        queries = queries + (
            load_heads(q, token * q_token + row * q_head, there, cos, sin, q_norm, eps, D, WIDTH, ROTATED, INTERLEAVED),
        )
    key = load_heads(k, token * k_token + head * k_head, there, cos, sin, k_norm, eps, D, WIDTH, ROTATED, INTERLEAVED)
    value = tl.load(v + token * v_token + (head * v_head)[:, None] + feature, mask=mask, other=0.0)
    for part in tl.static_range(GROUPS):
        row = part * HEADS + head
        tl.store(turned_q + ((token * GROUPS * HEADS + row) * D)[:, None] + feature, queries[part], mask=mask)
    tl.store(turned_k + ((token * HEADS + head) * D)[:, None] + feature, key, mask=mask)
    if slot >= 0:
        block = slot // BLOCK
        place = slot % BLOCK
        tl.store(k_pool + block * k_block + place * k_slot + (head * k_pool_head)[:, None] + feature, key, mask=mask)
        tl.store(v_pool + block * v_block + place * v_slot + (head * v_pool_head)[:, None] + feature, value, mask=mask)
