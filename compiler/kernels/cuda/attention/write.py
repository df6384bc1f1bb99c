"""New keys and values into the pools, keys after norm and rotary embedding: before the attention of several tokens."""

from __future__ import annotations

import triton
import triton.language as tl

from optc.compiler.kernels.cuda.attention.heads import load_heads, rotation
from optc.compiler.kernels.cuda.primitives import wait_for_producer


@triton.jit
def write(
    k, v, k_pool, v_pool, slot_mapping, position, inv_freq, k_norm,
    k_token, k_head, v_token, v_head, k_block, k_slot, k_pool_head, v_block, v_slot, v_pool_head,
    scaling, eps,
    HEADS: tl.constexpr, HEAD_ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, DV: tl.constexpr,
    VALUE_WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROTATED: tl.constexpr, INTERLEAVED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token per program, HEADS KV heads (HEAD_ROWS: padded to a power of two); padding is left out."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEAD_ROWS)
    there = head < HEADS
    slot = tl.load(slot_mapping + token)
    cos = 1.0
    sin = 0.0
    if ROTATED > 0:
        where = tl.load(position + token + tl.zeros([1], tl.int32))
        cos, sin = rotation(where, inv_freq, scaling, k.dtype.element_ty, WIDTH, ROTATED, INTERLEAVED)
    wait_for_producer(PDL)
    if slot >= 0:
        key = load_heads(
            k, token * k_token + head * k_head, there, cos, sin, k_norm, eps, D, WIDTH, ROTATED, INTERLEAVED
        )  # fmt: skip
        feature = tl.arange(0, WIDTH)[None, :]
        places = slot // BLOCK * k_block + slot % BLOCK * k_slot + (head * k_pool_head)[:, None] + feature
        tl.store(k_pool + places, key, mask=there[:, None] & (feature < D))
        feature = tl.arange(0, VALUE_WIDTH)[None, :]
        mask = there[:, None] & (feature < DV)
        value = tl.load(v + token * v_token + (head * v_head)[:, None] + feature, mask=mask, other=0.0)
        places = slot // BLOCK * v_block + slot % BLOCK * v_slot + (head * v_pool_head)[:, None] + feature
        tl.store(v_pool + places, value, mask=mask)
