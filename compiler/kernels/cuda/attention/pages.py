"""Keys and values of a request's context, read from the blocks of a pool, and scores of queries against them."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e30)
"""Where a running maximum begins: finite, so that a score of -inf below it has weight 0, not NaN."""


@triton.jit
def locate(table, start, key, inside, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Block (int64) and slot of keys [TILE] from `start` on, a multiple of TILE; 0 where not `inside`."""
    if BLOCK % TILE == 0:  # one block holds the tile: one look into the table
        block = tl.load(table + start // BLOCK).to(tl.int64)
        slot = start % BLOCK + tl.arange(0, TILE)
    else:
        block = tl.load(table + key // BLOCK, mask=inside, other=0).to(tl.int64)
        slot = key % BLOCK
    return block, slot


@triton.jit
def load_tile(
    pool, block, slot, inside, block_stride, slot_stride, D: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """[TILE, WIDTH] of the head at which `pool` points; zeros beyond D and where not `inside`."""
    feature = tl.arange(0, WIDTH)
    places = pool + (block * block_stride + slot * slot_stride)[:, None] + feature[None, :]
    mask = inside[:, None]
    if D != WIDTH:
        mask = mask & (feature < D)[None, :]
    return tl.load(places, mask=mask, other=0.0)


@triton.jit
def scores(q, k, inner, outer, SOFTCAP: tl.constexpr):
    """float32 [rows, TILE], in units of log 2: q k^T * inner; with a softcap c: c * tanh(q k^T * scale / c).

    Without one `inner` is scale * log2(e); with one, inner is scale / c and outer c * log2(e).
    """
    return capped(tl.dot(q, tl.trans(k), input_precision="ieee") * inner, outer, SOFTCAP)


@triton.jit
def new_scores(q, k, inner, outer, SOFTCAP: tl.constexpr):
    """The same of one key k [1, WIDTH], that of the new token: float32 [rows]."""
    return capped(tl.sum(q.to(tl.float32) * k.to(tl.float32), 1) * inner, outer, SOFTCAP)


@triton.jit
def capped(raw, outer, SOFTCAP: tl.constexpr):
    """With a softcap: outer * tanh(raw)."""
    if SOFTCAP:
        raw = (2.0 * tl.sigmoid(2.0 * raw) - 1.0) * outer
    return raw


@triton.jit
def keep(
    pool, row, slot, head, block_stride, slot_stride, head_stride,
    D: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """pool[slot, head] = row [1, WIDTH], the new token's key or value."""
    feature = tl.arange(0, WIDTH)[None, :]
    place = slot // BLOCK * block_stride + slot % BLOCK * slot_stride + head * head_stride
    tl.store(pool + place + feature, row, mask=feature < D)


@triton.jit
def leave_part(partials, statistics, part, row, mask, sums, top, total, WIDTH: tl.constexpr):
    """What a program found of a pair [rows, WIDTH], for the one that merges; `part` counts rows. Returns when all
    threads have written, so that one of them may say so."""
    feature = tl.arange(0, WIDTH)
    tl.store(partials + (part + row[:, None]) * WIDTH + feature[None, :], sums, mask=mask[:, None])
    tl.store(statistics + 2 * (part + row), top, mask=mask)
    tl.store(statistics + 2 * (part + row) + 1, total, mask=mask)
    tl.debug_barrier()


@triton.jit
def absorb(score, v, top, total, sums):
    """One step of the online softmax (Milakov and Gimelshein 2018): a tile's scores (-inf: unseen) and its values.

    Returns the running maximum and the sum of weights [rows], and weighted values [rows, WIDTH].
    """
    new_top = tl.maximum(top, tl.max(score, 1))
    shrink = tl.exp2(top - new_top)
    weight = tl.exp2(score - new_top[:, None])
    total = total * shrink + tl.sum(weight, 1)
    sums = tl.dot(weight.to(v.dtype), v, sums * shrink[:, None], input_precision="ieee")
    return new_top, total, sums
