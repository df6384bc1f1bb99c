"""Rounds of drafts: a program has a row, with its drafted tokens side by side; see `ops/dialect/drafts`.

`choose_draft` is `greedy_step` over the draft vocabulary: programs look at a part of a row, and the last of them chooses.
"""

import triton
import triton.language as tl

from optc.compiler.kernels.cuda.greedy.step import find_largest
from optc.compiler.kernels.cuda.primitives import wait_for_producer


@triton.jit
def slots_at(position, limit, row, block_tables, table_stride, table_width, wanted, BLOCK_SIZE: tl.constexpr):
    """The slots of positions of a row, -1 from its limit on, or where none is wanted."""
    real = wanted & (position < limit)
    column = tl.minimum(position // BLOCK_SIZE, table_width - 1)
    block = tl.load(block_tables + row.to(tl.int64) * table_stride + column, mask=real, other=0).to(tl.int64)
    return tl.where(real, block * BLOCK_SIZE + position % BLOCK_SIZE, -1)


@triton.jit
def lay_out(
    heads, drafts, block_tables, input_ids, position_ids, slot_mapping, context_lens,
    batch, draft_stride, table_stride, table_width, left,
    COUNT: tl.constexpr, PLACES: tl.constexpr, BLOCK_SIZE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`left`: lengths behind those of all tokens."""
    row = tl.program_id(0)
    place = tl.arange(0, PLACES)
    own = place < COUNT
    wait_for_producer(PDL)
    token, position = tl.load(heads + row), tl.load(heads + batch + row)
    limit, drafted = tl.load(heads + 2 * batch + row), tl.load(heads + 3 * batch + row)
    guessed = own & (place > 0) & (place <= drafted)
    draft = tl.load(drafts + row.to(tl.int64) * draft_stride + place - 1, mask=guessed, other=0)
    at = position + place
    slot = slots_at(at, limit, row, block_tables, table_stride, table_width, own, BLOCK_SIZE)
    out = row * COUNT + place
    tl.store(input_ids + out, tl.where(place == 0, token, draft), mask=own)
    tl.store(position_ids + out, tl.where(slot >= 0, at, 0), mask=own)
    tl.store(slot_mapping + out, slot, mask=own)
    tl.store(context_lens + out, tl.where(slot >= 0, at + 1, 0).to(tl.int32), mask=own)
    if row == 0:
        for start in range(0, left, PLACES):
            tl.store(context_lens + batch * COUNT + start + place, place * 0, mask=start + place < left)


@triton.jit
def accept(
    decided, heads, drafts, block_tables, picks, position_ids, slot_mapping, context_lens, outcome, behind,
    batch, draft_stride, table_stride, table_width, made,
    COUNT: tl.constexpr, PLACES: tl.constexpr, FURTHER: tl.constexpr, STEPS: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    place = tl.arange(0, PLACES)
    own = place < COUNT
    wait_for_producer(PDL)
    token, position = tl.load(heads + row), tl.load(heads + batch + row)
    limit, drafted = tl.load(heads + 2 * batch + row), tl.load(heads + 3 * batch + row)
    found = tl.load(decided + row * COUNT + place, mask=own, other=-1)
    draft = tl.load(drafts + row.to(tl.int64) * draft_stride + place, mask=place < COUNT - 1, other=-2)
    verified = tl.minimum(drafted, tl.minimum(tl.maximum(limit - position - 1, 0), COUNT - 1))
    agrees = (found == draft) & (place < verified)
    kept = tl.min(tl.where(agrees, COUNT - 1, place), 0)
    count = tl.minimum(1 + kept, tl.maximum(limit - position, 0))
    fed = tl.maximum(found, 0)
    tl.store(behind + row * COUNT + place, fed, mask=own)
    line = outcome + row * (COUNT + 2)
    tl.store(line + place, found, mask=own)
    tl.store(line + COUNT, count)
    tl.store(line + COUNT + 1, verified)
    picked = tl.maximum(count - 1, 0)
    tl.store(picks + row, row * COUNT + picked)
    last = tl.sum(tl.where(place == picked, fed, 0), 0)
    tl.store(heads + row, tl.where(count > 0, last, token))
    tl.store(heads + batch + row, position + count)
    tl.store(heads + 3 * batch + row, tl.where(count > 0, made, 0))
    if FURTHER > 0:
        step = tl.arange(0, STEPS)
        wanted = step < FURTHER
        at = position + count + step
        slot = slots_at(at, limit, row, block_tables, table_stride, table_width, wanted, BLOCK_SIZE)
        out = step * batch + row
        tl.store(position_ids + out, tl.where(slot >= 0, at, 0), mask=wanted)
        tl.store(slot_mapping + out, slot, mask=wanted)
        tl.store(context_lens + out, tl.where(slot >= 0, at + 1, 0).to(tl.int32), mask=wanted)


@triton.jit
def choose_draft(
    logits, targets, drafts, tokens, values, places, arrivals, V, row_stride, draft_stride,
    BLOCK: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`drafts`: the column that is written."""
    row = tl.program_id(1)
    last, token = find_largest(logits, values, places, arrivals, V, row_stride, BLOCK, PARTS, PDL)
    if last:
        chosen = tl.load(targets + tl.maximum(token, 0))
        tl.store(tokens + row, chosen)
        tl.store(drafts + row.to(tl.int64) * draft_stride, chosen)
