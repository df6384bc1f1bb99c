"""Attention of one new token per request where (request, KV head) pairs are few: a program for each part of a pair.

The same as `decode` computes, in half of its time for one request of a short context: what counts there is how long one
program takes from its queries to its result. The keys of a pair are divided evenly (split keys: Dao et al. 2023,
"Flash-Decoding") among as many programs as its share of the whole batch's keys asks for; the others end at once. Lengths
are read on the device, so that a captured CUDA graph serves any of them.

Keys and values of earlier steps do not depend on the kernel before. The wait for it and the load of the queries stand in
the first turn of the loop over tiles, so that the loop's pipeline asks for the first tiles before.
"""

from __future__ import annotations

import triton
import triton.language as tl

from optc.compiler.kernels.cuda.attention.decode import count_tiles, fill_rows
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
from optc.compiler.kernels.cuda.primitives import let_next_start, wait_for_producer

FEW_PARTS = tl.constexpr(4)
"""Parts that are merged by code of their own: loads of more, though not of parts that are there, are waited for."""


@triton.jit
def _merge(
    out, partials, statistics, begin, count,
    GROUP: tl.constexpr, GROUP_ROWS: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """Weighted mean of `count` parts from `begin` on, MERGED at a time; `out` points at the pair's first head.

    A thread has the same elements of all parts: nothing passes between threads, and all loads are on their way at once.
    """
    element = tl.arange(0, GROUP_ROWS * WIDTH)
    row = element // WIDTH
    feature = element % WIDTH
    top = tl.full([GROUP_ROWS * WIDTH], LOWEST, tl.float32)
    total = tl.zeros([GROUP_ROWS * WIDTH], tl.float32)
    value = tl.zeros([GROUP_ROWS * WIDTH], tl.float32)
    for start in range(0, count, MERGED):
        tops = ()
        totals = ()
        values = ()
        for i in tl.static_range(MERGED):
            part = (begin + start + i) * GROUP_ROWS
            there = (row < GROUP) & (start + i < count)
            tops = tops + (tl.load(statistics + 2 * (part + row), mask=there, other=LOWEST, cache_modifier=".cg"),)
            totals = totals + (tl.load(statistics + 2 * (part + row) + 1, mask=there, other=0.0, cache_modifier=".cg"),)
            values = values + (tl.load(partials + part * WIDTH + element, mask=there, other=0.0, cache_modifier=".cg"),)
        new_top = top
        for i in tl.static_range(MERGED):
            new_top = tl.maximum(new_top, tops[i])
        shrink = tl.exp2(top - new_top)
        total = total * shrink
        value = value * shrink
        for i in tl.static_range(MERGED):
            weight = tl.exp2(tops[i] - new_top)
            total += totals[i] * weight
            value += values[i] * weight
        top = new_top
    result = (value / tl.where(row < GROUP, total, 1.0)).to(out.dtype.element_ty)
    tl.store(out + row * DV + feature, result, mask=(row < GROUP) & (feature < DV))


@triton.jit(do_not_specialize=["at_a_time", "table_row"])
def decode_split(
    q, k, v, k_pool, v_pool, slot_mapping, tables, lengths, starts, position, inv_freq, q_norm, k_norm,
    out, partials, statistics, arrivals,
    q_token, q_head, k_token, k_head, v_token, v_head,
    k_block, k_slot, k_pool_head, v_block, v_slot, v_pool_head, table_row,
    at_a_time, inner, outer, scaling, eps,
    REQUESTS: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, GROUP_ROWS: tl.constexpr,
    D: tl.constexpr, WIDTH: tl.constexpr, DV: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ROTATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    TILE: tl.constexpr, STAGES: tl.constexpr, FEWEST: tl.constexpr, MERGED: tl.constexpr, EARLY: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """See `decode`, which takes the same arguments; the grid is [parts of a pair at most, HEADS, tokens], and
    token i is that of request i.

    Where `starts` does not say one token per request, the row is NaN, but for padding. at_a_time: programs by which the keys of all are
    divided; FEWEST tiles are the least that a program takes. partials float32 [requests, HEADS, parts, GROUP_ROWS,
    VALUE_WIDTH], statistics [..., GROUP_ROWS, 2]: each part's weighted values; its maximum and sum of weights.
    """
    let_next_start(PDL and EARLY)
    split = tl.program_id(0)
    head = tl.program_id(1)
    token = tl.program_id(2).to(tl.int64)
    every = tl.arange(0, REQUESTS)
    length_of = tl.load(lengths + every, mask=every < tl.num_programs(2), other=1)
    length = tl.load(lengths + token)
    slot = tl.load(slot_mapping + token)
    begins = tl.load(starts + token)
    ends = tl.load(starts + token + 1)
    _, _, tiles_of = count_tiles(length_of, WINDOW, TILE)
    first, begin, tiles = count_tiles(length, WINDOW, TILE)
    per = tl.maximum(tl.cdiv(tl.sum(tiles_of, 0) * HEADS, at_a_time), tl.cdiv(tiles, tl.num_programs(0)))
    per = tl.maximum(per, FEWEST)
    last_split = (tiles - 1) // per
    has_end = split == last_split
    start = (begin + split * per) * TILE
    limit = tl.minimum(start + per * TILE, length - 1)
    row = tl.arange(0, ROWS)
    in_group = row < GROUP
    feature = tl.arange(0, VALUE_WIDTH)
    in_value = feature < DV
    is_single = (begins == token) & (ends == token + 1)
    if (slot < 0) | (is_single == 0):
        if (split == 0) & (head == 0):
            wait_for_producer(PDL)
            fill_rows(out, token, tl.where(slot < 0, 0.0, float("nan")), HEADS * GROUP, DV, VALUE_WIDTH)
    elif split <= last_split:
        table = tables + token * table_row
        keys = k_pool + head * k_pool_head
        values = v_pool + head * v_pool_head
        cos = 1.0
        sin = 0.0
        one = tl.zeros([1], tl.int64)
        if ROTATED > 0:
            where = tl.load(position + token + one)
            cos, sin = rotation(where, inv_freq, scaling, q.dtype.element_ty, WIDTH, ROTATED, INTERLEAVED)
        queries = tl.zeros([ROWS, WIDTH], q.dtype.element_ty)
        top = tl.full([ROWS], LOWEST, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        sums = tl.zeros([ROWS, VALUE_WIDTH], tl.float32)
        for next_start in tl.range(start, tl.maximum(limit, start + 1), TILE, num_stages=STAGES):
            next_key = next_start + tl.arange(0, TILE)
            within = (next_key < limit) & (next_key >= first)
            block, place = locate(table, next_start, next_key, within, BLOCK, TILE)
            tile_k = load_tile(keys, block, place, within, k_block, k_slot, D, WIDTH)
            tile_v = load_tile(values, block, place, within, v_block, v_slot, DV, VALUE_WIDTH)
            if next_start == start:
                let_next_start(PDL)
                wait_for_producer(PDL)
                queries = load_heads(
                    q, token * q_token + (head * GROUP + row) * q_head, in_group, cos, sin, q_norm, eps,
                    D, WIDTH, ROTATED, INTERLEAVED,
                )  # fmt: skip
                if has_end:
                    new_k = load_heads(
                        k, one + token * k_token + head * k_head, one == 0, cos, sin, k_norm, eps,
                        D, WIDTH, ROTATED, INTERLEAVED,
                    )  # fmt: skip
                    new_v = tl.load(v + token * v_token + head * v_head + feature, mask=in_value, other=0.0)[None, :]
                    keep(k_pool, new_k, slot, head, k_block, k_slot, k_pool_head, D, WIDTH, BLOCK)
                    keep(v_pool, new_v, slot, head, v_block, v_slot, v_pool_head, DV, VALUE_WIDTH, BLOCK)
                    top = new_scores(queries, new_k, inner, outer, SOFTCAP)
                    total = tl.full([ROWS], 1.0, tl.float32)
                    sums += new_v.to(tl.float32)
            score = tl.where(within[None, :], scores(queries, tile_k, inner, outer, SOFTCAP), float("-inf"))
            top, total, sums = absorb(score, tile_v, top, total, sums)
        target = out + (token * HEADS + head) * GROUP * DV
        if last_split == 0:
            rows = (sums / total[:, None]).to(out.dtype.element_ty)
            tl.store(target + row[:, None] * DV + feature[None, :], rows, mask=in_group[:, None] & in_value[None, :])
        else:
            pair = token * HEADS + head
            part = (pair * tl.num_programs(0) + split) * GROUP_ROWS
            leave_part(partials, statistics, part, row, in_group, sums, top, total, VALUE_WIDTH)
            if tl.atomic_add(arrivals + pair, 1, sem="acq_rel") == last_split:
                if last_split < FEW_PARTS:
                    _merge(
                        target, partials, statistics, pair * tl.num_programs(0), last_split + 1,
                        GROUP, GROUP_ROWS, DV, VALUE_WIDTH, FEW_PARTS,
                    )  # fmt: skip
                else:
                    _merge(
                        target, partials, statistics, pair * tl.num_programs(0), last_split + 1,
                        GROUP, GROUP_ROWS, DV, VALUE_WIDTH, MERGED,
                    )  # fmt: skip
                tl.store(arrivals + pair, 0)
