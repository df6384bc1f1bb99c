"""Ends of decode steps.

`greedy_step` is one launch: programs look for the largest logit of a part of a row, and the last of a row chooses and
advances it. `advance_step` advances rows whose tokens another kernel chose.
"""

import triton
import triton.language as tl

from optc.compiler.kernels.cuda.primitives import wait_for_producer

INFINITY = tl.constexpr(float("inf"))
NOWHERE = tl.constexpr(2**31 - 1)


@triton.jit
def advance_row(
    row, token, input_ids, position_ids, slot_mapping, context_lens, block_tables, table_width,
    BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """The inputs of a row's next step, which is fed `token`; see `optc::advance_step_`."""
    if tl.load(slot_mapping + row) != -1:
        position = tl.load(position_ids + row) + 1
        column = tl.minimum(position // BLOCK_SIZE, table_width - 1)
        block = tl.load(block_tables + row * table_width + column).to(tl.int64)
        tl.store(input_ids + row, tl.maximum(token, 0))
        tl.store(position_ids + row, position)
        tl.store(slot_mapping + row, block * BLOCK_SIZE + position % BLOCK_SIZE)
        tl.store(context_lens + row, tl.load(context_lens + row) + 1)


@triton.jit
def advance_step(
    tokens, input_ids, position_ids, slot_mapping, context_lens, block_tables, table_width,
    BLOCK_SIZE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One row in each program."""
    row = tl.program_id(0)
    wait_for_producer(PDL)
    advance_row(
        row, tl.load(tokens + row), input_ids, position_ids, slot_mapping, context_lens, block_tables, table_width,
        BLOCK_SIZE,
    )  # fmt: skip


@triton.jit
def find_largest(
    logits, values, places, arrivals, V, row_stride, BLOCK: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr
):
    """Whether a program is the last of its row, and then the row's token, int64: that of the largest logit, or -1 where
    it is not finite. PARTS programs look at a part each; whatever one of them writes is read behind this."""
    part, row = tl.program_id(0), tl.program_id(1)
    columns = part * BLOCK + tl.arange(0, BLOCK)
    best = tl.full([BLOCK], -INFINITY, tl.float32)
    at = tl.full([BLOCK], NOWHERE, tl.int32)
    wait_for_producer(PDL)
    source = logits + row.to(tl.int64) * row_stride
    for start in range(0, V, BLOCK * PARTS):
        here = start + columns
        value = tl.load(source + here, mask=here < V, other=-INFINITY).to(tl.float32)
        value = tl.where(value != value, INFINITY, value)  # NaN is found out as infinity is
        at = tl.where(value > best, here, at)
        best = tl.maximum(best, value)
    top = tl.max(best, 0)
    tl.store(values + row * PARTS + part, top)
    tl.store(places + row * PARTS + part, tl.min(tl.where(best == top, at, NOWHERE), 0))
    tl.debug_barrier()  # all threads have stored before one of them counts
    last = tl.atomic_add(arrivals + row, 1, sem="acq_rel") == PARTS - 1
    token = tl.full([], -1, tl.int64)
    if last:
        tl.store(arrivals + row, 0)
        parts = row * PARTS + tl.arange(0, PARTS)
        tops = tl.load(values + parts, cache_modifier=".cg")
        found = tl.load(places + parts, cache_modifier=".cg")
        top = tl.max(tops, 0)
        token = tl.min(tl.where(tops == top, found, NOWHERE), 0).to(tl.int64)
        token = tl.where(tl.abs(top) == INFINITY, -1, token)
    return last, token


@triton.jit
def greedy_step(
    logits, tokens, input_ids, position_ids, slot_mapping, context_lens, block_tables, values, places, arrivals,
    V, row_stride, table_width,
    BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1)
    last, token = find_largest(logits, values, places, arrivals, V, row_stride, BLOCK, PARTS, PDL)
    if last:
        tl.store(tokens + row, token)
        advance_row(
            row, token, input_ids, position_ids, slot_mapping, context_lens, block_tables, table_width, BLOCK_SIZE
        )  # fmt: skip
