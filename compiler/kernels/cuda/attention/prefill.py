"""Attention of several new tokens per request over a paged pool that holds their keys and values already.

A program has TOKENS neighbouring tokens of a request with all query heads of a KV head as rows of one tile, and goes
through the keys that the last of them sees (FlashAttention-2: Dao 2023, https://arxiv.org/abs/2307.08691).
"""

from __future__ import annotations

import triton
import triton.language as tl

from optc.compiler.kernels.cuda.attention.heads import load_heads, rotation
from optc.compiler.kernels.cuda.attention.pages import LOWEST, capped
from optc.compiler.kernels.cuda.primitives import wait_for_producer


@triton.jit
def _look_up(table, start, first, end, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Blocks of the keys from `start` on, as far as a row sees them: of a tile, where one holds it; else [TILE]."""
    if BLOCK % TILE == 0:
        return tl.load(table + start // BLOCK, mask=start < end, other=0).to(tl.int64)
    else:
        key = start + tl.arange(0, TILE)
        return tl.load(table + key // BLOCK, mask=(key >= first) & (key < end), other=0).to(tl.int64)


@triton.jit
def _load(
    pool, block, start, inside, block_stride, slot_stride,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """[TILE, WIDTH] of the keys from `start` on; MASKED: zeros where not `inside`."""
    feature = tl.arange(0, WIDTH)
    slot = (start + tl.arange(0, TILE)) % BLOCK
    places = pool + (block * block_stride + slot * slot_stride)[:, None] + feature[None, :]
    if MASKED and D != WIDTH:
        return tl.load(places, mask=inside[:, None] & (feature < D)[None, :], other=0.0)
    elif MASKED:
        return tl.load(places, mask=inside[:, None], other=0.0)
    elif D != WIDTH:
        return tl.load(places, mask=(feature < D)[None, :], other=0.0)
    else:
        return tl.load(places)


@triton.jit
def _attend(
    queries, keys, values, table, where, first, begin, end, top, total, sums, inner, outer,
    k_block, k_slot, v_block, v_slot,
    D: tl.constexpr, WIDTH: tl.constexpr, DV: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr, ALL_SEEN: tl.constexpr,
):  # fmt: skip
    """Absorb keys begin .. end of a request, begin a multiple of TILE; ALL_SEEN: every row sees all of them.

    Blocks with keys before `first` alone may be given back: the table is not asked for them. It is asked for a tile ahead,
    so that keys are loaded without waiting for it. Running maxima are in units of log 2: `inner`, which is positive, is
    multiplied into one of them and into the difference, not into every score.
    """
    block = _look_up(table, begin, first, end, BLOCK, TILE)
    for start in tl.range(begin, end, TILE, num_stages=STAGES):
        next_block = _look_up(table, start + TILE, first, end, BLOCK, TILE)
        key = start + tl.arange(0, TILE)
        inside = (key >= first) & (key < end)
        tile_k = _load(
            keys, block, start, inside, k_block, k_slot, D, WIDTH, BLOCK, TILE, not ALL_SEEN
        )  # fmt: skip
        score = tl.dot(queries, tl.trans(tile_k), input_precision="ieee")
        factor = inner
        if SOFTCAP:
            score = capped(score * inner, outer, True)
            factor = 1.0
        if not ALL_SEEN:
            seen = (key[None, :] <= where[:, None]) & inside[None, :]
            if WINDOW > 0:
                seen = seen & (key[None, :] > where[:, None] - WINDOW)
            score = tl.where(seen, score, float("-inf"))
        tile_v = _load(
            values, block, start, inside, v_block, v_slot, DV, VALUE_WIDTH, BLOCK, TILE, not ALL_SEEN
        )  # fmt: skip
        new_top = tl.maximum(top, tl.max(score, 1) * factor)
        shrink = tl.exp2(top - new_top)
        weight = tl.exp2(score * factor - new_top[:, None])
        total = total * shrink + tl.sum(weight, 1)
        sums = tl.dot(weight.to(tile_v.dtype), tile_v, sums * shrink[:, None], input_precision="ieee")
        top = new_top
        block = next_block
    return top, total, sums


@triton.jit(do_not_specialize=["requests", "table_row"])  # other batches need no other code
def prefill(
    q, k_pool, v_pool, slot_mapping, tables, lengths, starts, position, inv_freq, q_norm, out,
    q_token, q_head, k_block, k_slot, k_pool_head, v_block, v_slot, v_pool_head, table_row,
    requests, inner, outer, scaling, eps,
    REQUESTS: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, DV: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ROTATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    TILE: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """See `decode`, which serves requests of one token; TOKENS * GROUP <= ROWS.

    Programs [tiles of tokens, HEADS]; there may be more than tiles, whose number only the device knows.
    """
    every = tl.arange(0, REQUESTS)
    known = every < requests
    fresh = tl.load(starts + every + 1, mask=known, other=0) - tl.load(starts + every, mask=known, other=0)
    tiles_of = tl.where(fresh > 1, tl.cdiv(fresh, TOKENS), 0)
    ends = tl.cumsum(tiles_of, 0)
    # Late tokens see most keys: their programs start first.
    tile = tl.sum(tiles_of, 0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    wait_for_producer(PDL)
    if tile >= 0:
        request = tl.sum((ends <= tile).to(tl.int32), 0)
        tile_in_request = tile - tl.sum(tl.where(every < request, tiles_of, 0), 0)
        begin_token = tl.load(starts + request)
        end_token = tl.load(starts + request + 1)
        past = tl.load(lengths + request) - (end_token - begin_token)
        row = tl.arange(0, ROWS)
        offset = tile_in_request * TOKENS + row // GROUP
        there = (row < TOKENS * GROUP) & (offset < end_token - begin_token)
        token = (begin_token + offset).to(tl.int64)
        is_real = tl.load(slot_mapping + token, mask=there, other=-1) >= 0
        where = past + offset
        cos = 1.0
        sin = 0.0
        if ROTATED > 0:
            cos, sin = rotation(
                tl.load(position + token, mask=there, other=0), inv_freq, scaling, q.dtype.element_ty,
                WIDTH, ROTATED, INTERLEAVED,
            )  # fmt: skip
        query_head = head * GROUP + row % GROUP
        queries = load_heads(
            q, token * q_token + query_head * q_head, there, cos, sin, q_norm, eps, D, WIDTH, ROTATED, INTERLEAVED
        )  # fmt: skip
        table = tables + request.to(tl.int64) * table_row
        keys = k_pool + head * k_pool_head
        values = v_pool + head * v_pool_head
        # Neither length nor blocks of padding mean anything: a tile of padding alone has no keys.
        first_where = past + tile_in_request * TOKENS
        end = tl.max(tl.where(is_real, where + 1, 0), 0)
        first = end * 0
        begin = first
        # Rows that see a key see all of them up to the first row's position, unless a window has passed some.
        full = tl.minimum(first_where + 1, end) // TILE * TILE
        if WINDOW > 0:
            first = tl.minimum(tl.maximum(first_where + 1 - WINDOW, 0), end)
            begin = first // TILE * TILE
            full = begin
        top = tl.full([ROWS], LOWEST, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        sums = tl.zeros([ROWS, VALUE_WIDTH], tl.float32)
        if WINDOW == 0:
            top, total, sums = _attend(
                queries, keys, values, table, where, first, begin, full, top, total, sums, inner, outer,
                k_block, k_slot, v_block, v_slot,
                D, WIDTH, DV, VALUE_WIDTH, BLOCK, WINDOW, SOFTCAP, TILE, STAGES, True,
            )  # fmt: skip
        top, total, sums = _attend(
            queries, keys, values, table, where, first, full, end, top, total, sums, inner, outer,
            k_block, k_slot, v_block, v_slot,
            D, WIDTH, DV, VALUE_WIDTH, BLOCK, WINDOW, SOFTCAP, TILE, STAGES, False,
        )  # fmt: skip
        feature = tl.arange(0, VALUE_WIDTH)
        shares = sums / tl.where(is_real, total, 1.0)[:, None]
        rows = tl.where(is_real[:, None], shares, 0.0).to(out.dtype.element_ty)
        places = out + ((token * HEADS * GROUP + query_head) * DV)[:, None] + feature[None, :]
        tl.store(places, rows, mask=there[:, None] & (feature < DV)[None, :])
