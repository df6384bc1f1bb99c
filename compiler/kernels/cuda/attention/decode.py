"""Attention of one new token per request over a paged pool: its norms, rotary embedding and KV write in one launch.

The work of all (request, KV head) pairs, START units for a beginning and one for each tile of keys, forms one line, of
which every program takes an equal share: ragged batches are as balanced as even ones (stream-K: Osama et al. 2023,
https://arxiv.org/abs/2301.03598; split keys: Dao et al. 2023, "Flash-Decoding"). Lengths are read on the device, so
that a captured CUDA graph serves any of them. The query heads of a KV head are rows of one tile. A pair that several
programs share is merged by the one that ends last.

The new token's key and value come from registers, not through the pool.
"""

from __future__ import annotations

import triton
import triton.language as tl

from optc.compiler.kernels.cuda.attention.heads import load_heads, rotation
from optc.compiler.kernels.cuda.attention.pages import (
    LOWEST,
    absorb,
    keep,
    leave_part,
    load_tile,
    locate,
    new_scores,
    scores,
)
from optc.compiler.kernels.cuda.primitives import wait_for_producer


@triton.jit
def count_tiles(length, WINDOW: tl.constexpr, TILE: tl.constexpr):
    """For a context of `length` with the new token: first key that it sees, its tile, and the number of tiles.

    There is one tile at least: who has the last tile adds the new token.
    """
    first = length * 0
    if WINDOW > 0:
        first = tl.maximum(length - WINDOW, 0)
    begin = first // TILE
    return first, begin, tl.maximum(tl.cdiv(length - 1, TILE) - begin, 1)


@triton.jit
def fill_rows(out, token, value, HEADS: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr):
    """out[token] = value"""
    feature = tl.arange(0, WIDTH)
    filled = tl.full([WIDTH], value, tl.float32).to(out.dtype.element_ty)
    for head in range(HEADS):
        tl.store(out + (token * HEADS + head) * DV + feature, filled, mask=feature < DV)


@triton.jit
def _fill_unserved(
    out, slot_mapping, starts, requests, ALONE: tl.constexpr, HEADS: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Zeros for padding. Where all requests should have one token and one has not, NaN: its rows are not computed."""
    for request in range(tl.program_id(0), requests, tl.num_programs(0)):
        token = tl.load(starts + request).to(tl.int64)
        is_single = tl.load(starts + request + 1) - token == 1
        if ALONE:
            is_single = is_single & (token == request)
        if is_single:
            if tl.load(slot_mapping + token) < 0:
                fill_rows(out, token, 0.0, HEADS, DV, WIDTH)
        elif ALONE:
            fill_rows(out, tl.cast(request, tl.int64), float("nan"), HEADS, DV, WIDTH)


@triton.jit
def _merge(
    out, partials, statistics, first_program, last_program, feature, mask,
    GROUP: tl.constexpr, GROUP_ROWS: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """Weighted mean of the parts of one pair, MERGED at a time; `out` points at its first head."""
    row = tl.arange(0, GROUP_ROWS)
    lane = tl.arange(0, MERGED)
    top = tl.full([GROUP_ROWS], LOWEST, tl.float32)
    total = tl.zeros([GROUP_ROWS], tl.float32)
    sums = tl.zeros([GROUP_ROWS, WIDTH], tl.float32)
    for start in range(first_program, last_program + 1, MERGED):
        program = start + lane
        there = (program <= last_program)[:, None] & (row < GROUP)[None, :]
        # The pair is the last one of the program in which it begins, and the first one of the others.
        part = (program * 2 + (program == first_program).to(tl.int32))[:, None] * GROUP_ROWS + row[None, :]
        tops = tl.load(statistics + 2 * part, mask=there, other=LOWEST, cache_modifier=".cg")
        totals = tl.load(statistics + 2 * part + 1, mask=there, other=0.0, cache_modifier=".cg")
        places = partials + part[:, :, None] * WIDTH + feature[None, None, :]
        values = tl.load(places, mask=there[:, :, None], other=0.0, cache_modifier=".cg")
        new_top = tl.maximum(top, tl.max(tops, 0))
        shrink = tl.exp2(top - new_top)
        weight = tl.exp2(tops - new_top[None, :])
        total = total * shrink + tl.sum(totals * weight, 0)
        sums = sums * shrink[:, None] + tl.sum(values * weight[:, :, None], 0)
        top = new_top
    rows = (sums / tl.where(row < GROUP, total, 1.0)[:, None]).to(out.dtype.element_ty)
    tl.store(out + row[:, None] * DV + feature[None, :], rows, mask=(row < GROUP)[:, None] & mask[None, :])


@triton.jit(do_not_specialize=["requests", "table_row"])  # other batches need no other code
def decode(
    q, k, v, k_pool, v_pool, slot_mapping, tables, lengths, starts, position, inv_freq, q_norm, k_norm,
    out, partials, statistics, arrivals,
    q_token, q_head, k_token, k_head, v_token, v_head,
    k_block, k_slot, k_pool_head, v_block, v_slot, v_pool_head, table_row,
    requests, inner, outer, scaling, eps,
    REQUESTS: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, GROUP_ROWS: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, DV: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ROTATED: tl.constexpr, INTERLEAVED: tl.constexpr, ALONE: tl.constexpr,
    TILE: tl.constexpr, STAGES: tl.constexpr, START: tl.constexpr, MERGED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """See `optc::paged_attention_` and `optc::rotary_paged_attention_`; requests of other than one token are left out.

    HEADS counts KV heads, each of GROUP query heads; ROWS and GROUP_ROWS are GROUP padded for products and for merging,
    WIDTH and VALUE_WIDTH are D and DV padded, REQUESTS is `requests` padded to powers of two. Strides are in elements.
    partials [programs, 2, GROUP_ROWS, VALUE_WIDTH] and statistics [programs, 2, GROUP_ROWS, 2] are float32;
    arrivals int32 [requests * HEADS] is zero before and after.
    """
    every = tl.arange(0, REQUESTS)
    known = every < requests
    token_of = tl.load(starts + every, mask=known, other=0)
    served = known & (tl.load(starts + every + 1, mask=known, other=0) - token_of == 1)
    if ALONE:  # no need to wait for token_of
        slot_of = tl.load(slot_mapping + every, mask=known, other=-1)
        served = served & (token_of == every)
    else:
        slot_of = tl.load(slot_mapping + token_of, mask=served, other=-1)
    served = served & (slot_of >= 0)
    length_of = tl.load(lengths + every, mask=known, other=1)
    _, _, tiles_of = count_tiles(length_of, WINDOW, TILE)
    units_of = tl.where(served, START + tiles_of, 0)
    ends = tl.cumsum(units_of, 0) * HEADS
    line = tl.sum(units_of, 0) * HEADS
    share = tl.maximum(tl.cdiv(line, tl.num_programs(0)), START + 1)
    here = tl.program_id(0) * share
    stop = tl.minimum(here + share, line)

    row = tl.arange(0, ROWS)
    in_group = row < GROUP
    feature = tl.arange(0, VALUE_WIDTH)
    in_value = feature < DV
    out_places = row[:, None] * DV + feature[None, :]
    while here < stop:
        request = tl.sum((ends <= here).to(tl.int32), 0)
        is_it = every == request
        length = tl.sum(tl.where(is_it, length_of, 0), 0)
        slot = tl.sum(tl.where(is_it, slot_of, 0), 0)
        token = tl.sum(tl.where(is_it, token_of, 0), 0).to(tl.int64)
        first, begin, tiles = count_tiles(length, WINDOW, TILE)
        units = START + tiles
        behind = here - tl.sum(tl.where(is_it, ends, 0), 0) + units * HEADS  # units of the request
        head = behind // units
        pair_start = here - behind % units
        pair_end = pair_start + units
        last = tl.minimum(stop, pair_end)
        first_tile = tl.maximum(here - pair_start - START, 0)
        end_tile = tl.maximum(last - pair_start - START, 0)
        has_end = last == pair_end
        start = (begin + first_tile) * TILE
        limit = tl.minimum((begin + end_tile) * TILE, length - 1)
        table = tables + request.to(tl.int64) * table_row
        keys = k_pool + head * k_pool_head
        values = v_pool + head * v_pool_head

        cos = 1.0
        sin = 0.0
        one = tl.zeros([1], tl.int64)
        if ROTATED > 0:
            where = tl.load(position + token + one)
            cos, sin = rotation(where, inv_freq, scaling, q.dtype.element_ty, WIDTH, ROTATED, INTERLEAVED)
        wait_for_producer(PDL)

        queries = load_heads(
            q, token * q_token + (head * GROUP + row) * q_head, in_group, cos, sin, q_norm, eps,
            D, WIDTH, ROTATED, INTERLEAVED,
        )  # fmt: skip
        new_k = load_heads(
            k, one + token * k_token + head * k_head, (one == 0) & has_end, cos, sin, k_norm, eps,
            D, WIDTH, ROTATED, INTERLEAVED,
        )  # fmt: skip
        new_v = tl.load(v + token * v_token + head * v_head + feature, mask=in_value & has_end, other=0.0)[None, :]
        top = tl.full([ROWS], LOWEST, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        sums = tl.zeros([ROWS, VALUE_WIDTH], tl.float32)
        for next_start in tl.range(start, limit, TILE, num_stages=STAGES):
            next_key = next_start + tl.arange(0, TILE)
            within = (next_key < limit) & (next_key >= first)
            next_block, next_place = locate(table, next_start, next_key, within, BLOCK, TILE)
            tile_k = load_tile(keys, next_block, next_place, within, k_block, k_slot, D, WIDTH)
            score = tl.where(within[None, :], scores(queries, tile_k, inner, outer, SOFTCAP), float("-inf"))
            tile_v = load_tile(values, next_block, next_place, within, v_block, v_slot, DV, VALUE_WIDTH)
            top, total, sums = absorb(score, tile_v, top, total, sums)

        if has_end:
            keep(k_pool, new_k, slot, head, k_block, k_slot, k_pool_head, D, WIDTH, BLOCK)
            keep(v_pool, new_v, slot, head, v_block, v_slot, v_pool_head, DV, VALUE_WIDTH, BLOCK)
            raw = new_scores(queries, new_k, inner, outer, SOFTCAP)
            new_top = tl.maximum(top, raw)
            shrink = tl.exp2(top - new_top)
            weight = tl.exp2(raw - new_top)
            total = total * shrink + weight
            sums = sums * shrink[:, None] + weight[:, None] * new_v.to(tl.float32)
            top = new_top

        target = out + (token * HEADS + head) * GROUP * DV
        if end_tile - first_tile == tiles:
            rows = (sums / total[:, None]).to(out.dtype.element_ty)
            tl.store(target + out_places, rows, mask=in_group[:, None] & in_value[None, :])
        elif end_tile > first_tile:  # else all of the share was a beginning
            part = (tl.program_id(0) * 2 + (first_tile == 0).to(tl.int32)) * GROUP_ROWS
            leave_part(partials, statistics, part, row, in_group, sums, top, total, VALUE_WIDTH)
            first_program = (pair_start + START) // share
            last_program = (pair_end - 1) // share
            arrived = tl.atomic_add(arrivals + request * HEADS + head, 1, sem="acq_rel")
            if arrived == last_program - first_program:
                _merge(
                    target, partials, statistics, first_program, last_program, feature, in_value,
                    GROUP, GROUP_ROWS, DV, VALUE_WIDTH, MERGED,
                )  # fmt: skip
                tl.store(arrivals + request * HEADS + head, 0)
        here = last
    unserved = tl.sum((known & ~served).to(tl.int32), 0)
    if (tl.program_id(0) == 0) | (unserved > 0):  # else who has no share ends, and leaves its place to the next kernel
        wait_for_producer(PDL)
    if unserved > 0:
        _fill_unserved(out, slot_mapping, starts, requests, ALONE, HEADS * GROUP, DV, VALUE_WIDTH)
