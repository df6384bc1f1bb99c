"""Up to 16 tokens times a weight of 4- or 8-bit integers: weights go from memory into the operands of tensor cores.

The arithmetic is that of `product_integer`: 16-bit fixed point in two digits, sums of 128 columns exact in 32 bits,
scaled once. There, a tile of the weight passes through shared memory, a group of columns after the other, each behind a
barrier. Here a warp multiplies by itself: the layout of the weight is such that 16 bytes of each of 8 rows' threads are
what `mma.sync` wants of 128 columns (4 bits; 64 columns of 8 bits), so that a thread loads what it multiplies, and the
digits likewise. Warps share the columns out, and their sums are added up at the end, so that every warp of the GPU has
weights on their way all the time; the first are asked for before the tokens are there.
"""

from __future__ import annotations

import triton
import triton.language as tl

from optc.compiler.kernels.cuda.linear.fragments import (
    high_nibbles,
    in_place,
    load_again,
    load_once,
    low_nibbles,
    multiply,
    stack,
)
from optc.compiler.kernels.cuda.primitives import finish_block, let_next_start, wait_for_producer

COLUMNS = tl.constexpr(128)
"""That are multiplied at a time."""


@triton.jit
def _load_rows(
    w, scale, zero, rows, block, thread, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, NATIVE: tl.constexpr
):  # fmt: skip
    """A thread's part of a block of columns of two rows, 8 apart: words of the first, of the second, and (for groups) their
    scales and zero points."""
    held = ()
    factors = ()
    for i in tl.static_range(2):
        row = rows[i].to(tl.int64)
        places = w + row * (K * BITS // 8) + block * (COLUMNS * BITS // 8) + thread * 16
        held = held + load_once(places, NATIVE)
        if BITS == 8:
            held = held + load_once(places + 64, NATIVE)
        if GROUP > 0:
            place = row * (K // COLUMNS) + block
            factors = factors + (tl.load(scale + place).to(tl.float32),)
            if zero is not None:
                factors = factors + (tl.load(zero + place).to(tl.float32),)
    return held + factors


@triton.jit
def _load_tile(
    w, scale, zero, rows, block, thread, TILES: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """`_load_rows` of TILES pairs of rows."""
    held = ()
    for i in tl.static_range(TILES):
        held = held + _load_rows(w, scale, zero, (rows[2 * i], rows[2 * i + 1]), block, thread, K, BITS, GROUP, NATIVE)
    return held


@triton.jit
def _load_digits(digits, tokens, block, thread, half, K: tl.constexpr, BITS: tl.constexpr, NATIVE: tl.constexpr):
    """A thread's digits of a block of columns, of 8 tokens: 8 words; `half` is the size of the digits of low nibbles."""
    places = digits + tokens * (2 * K * BITS // 8) + block * (COLUMNS * BITS // 8) + thread * 16
    return load_again(places, NATIVE) + load_again(places + (half if BITS == 4 else 64), NATIVE)


@triton.jit
def _operand(held, first: tl.constexpr, step: tl.constexpr, BITS: tl.constexpr):
    """The four words of A in a step of 32 columns, of the pair of rows whose words begin at `first`."""
    if BITS == 4:
        upper = held[first + step]
        lower = held[first + 4 + step]
        return low_nibbles(upper), low_nibbles(lower), high_nibbles(upper), high_nibbles(lower)
    else:
        return held[first + step], held[first + 8 + step], held[first + 4 + step], held[first + 12 + step]


@triton.jit
def _into(a, b, sums, step: tl.constexpr, at: tl.constexpr, NATIVE: tl.constexpr):
    """A step of 32 columns added to the four sums that begin at `at`."""
    return multiply(
        a[0], a[1], a[2], a[3], b[step], b[step + 4], sums[at], sums[at + 1], sums[at + 2], sums[at + 3], NATIVE
    )  # fmt: skip


@triton.jit
def _products(
    held,
    high,
    low,
    TILES: tl.constexpr,
    EACH: tl.constexpr,
    EIGHTS: tl.constexpr,
    BITS: tl.constexpr,
    NATIVE: tl.constexpr,
):
    """Sums over a block of columns, int32: four words for each pair of rows and 8 tokens. EACH: a pair's tensors in `held`."""
    sums = ()
    for _i in tl.static_range(TILES * EIGHTS * 4):
        sums = sums + (tl.zeros(held[0].shape, tl.int32),)
    for plane in tl.static_range(2):
        if plane == 1:
            shifted = ()
            for i in tl.static_range(TILES * EIGHTS * 4):
                shifted = shifted + (sums[i] << 8,)
            sums = shifted
        for step in tl.static_range(4):
            new = ()
            for tile in tl.static_range(TILES):
                a = _operand(held, tile * EACH, step, BITS)
                for eight in tl.static_range(EIGHTS):
                    b = high if plane == 0 else low
                    new = new + _into(a, b, sums, eight * 8 + step, (tile * EIGHTS + eight) * 4, NATIVE)
            sums = new
    return sums


@triton.jit
def _absorb(
    held, totals, digits, group_sums, tokens, results, block, share, thread, half,
    TILES: tl.constexpr, EIGHTS: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    ZEROS: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """`totals` with the products of one block of columns, times `share`, which is None or 0 for a block of another warp.

    Args:
        tokens: of a thread's digits, one of 8 each. results: the tokens of its four sums, two of 8 each.
    """
    WORDS: tl.constexpr = 2 * BITS
    EACH: tl.constexpr = WORDS + (0 if GROUP == 0 else (4 if ZEROS else 2))
    high = ()
    low = ()
    for eight in tl.static_range(EIGHTS):
        high = high + _load_digits(digits, tokens[eight], block, thread, half, K, BITS, NATIVE)
        low = low + _load_digits(digits + K * BITS // 8, tokens[eight], block, thread, half, K, BITS, NATIVE)
    sums = _products(held, high, low, TILES, EACH, EIGHTS, BITS, NATIVE)
    of_group = ()
    if ZEROS and GROUP > 0:
        for i in tl.static_range(2 * EIGHTS):
            of_group = of_group + (tl.load(group_sums + results[i] * (K // COLUMNS) + block),)
    new = ()
    for tile in tl.static_range(TILES):
        for eight in tl.static_range(EIGHTS):
            for i in tl.static_range(4):
                value = sums[(tile * EIGHTS + eight) * 4 + i].to(tl.float32)
                if GROUP > 0:
                    if ZEROS:
                        value -= held[tile * EACH + WORDS + i // 2 * 2 + 1] * of_group[eight * 2 + i % 2]
                    value *= held[tile * EACH + WORDS + i // 2 * (2 if ZEROS else 1)]
                if share is not None:
                    value *= share
                new = new + (totals[(tile * EIGHTS + eight) * 4 + i] + value,)
    return new


@triton.jit
def product_direct(
    digits, unit, group_sums, w, scale, zero, bias, residual, y, partial, arrivals, M, N,
    K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr,
    EIGHTS: tl.constexpr, TILES: tl.constexpr, ACROSS: tl.constexpr, WARPS: tl.constexpr, SPLIT: tl.constexpr,
    DEPTH: tl.constexpr, NATIVE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y [M, N] of the tokens that split_tokens made; see `product_integer` for the arguments. M <= 8 * EIGHTS.

    A warp has TILES tiles of 16 rows (of gate and up one after the other, half of them each); ACROSS warps of a program have
    other rows and the same columns. DEPTH blocks of 128 columns are under way. K is a multiple of 128, GROUP 128 or 0.
    Programs [blocks of results, SPLIT].

    Args:
        partial: float32 [blocks, SPLIT, 2 * GATED, results of a block * tokens], scratch.
    """
    RESULTS: tl.constexpr = TILES // (2 if GATED else 1)
    BLOCK_N: tl.constexpr = 16 * RESULTS * ACROSS
    DOWN: tl.constexpr = WARPS // ACROSS
    STEP: tl.constexpr = DOWN * SPLIT
    BLOCKS: tl.constexpr = K // COLUMNS
    TURNS: tl.constexpr = (BLOCKS + STEP - 1) // STEP
    EVEN: tl.constexpr = BLOCKS % STEP == 0
    AHEAD: tl.constexpr = min(DEPTH, TURNS)
    ZEROS: tl.constexpr = zero is not None
    lane = tl.arange(0, 32 * WARPS)
    thread = lane % 4
    down = lane // (32 * ACROSS)
    first = tl.program_id(0) * BLOCK_N + lane // 32 % ACROSS * (16 * RESULTS) + lane // 4 % 8
    rows = ()
    for i in tl.static_range(2 * TILES):
        row = tl.minimum(first + i % (2 * RESULTS) * 8, N - 1)
        rows = rows + (row + N if i >= 2 * RESULTS else row,)
    begin = tl.program_id(1) * DOWN + down  # then every STEP-th: only a last turn may be without a block
    tiles = ()
    for i in tl.static_range(AHEAD):
        block = tl.minimum(begin + i * STEP, BLOCKS - 1)
        tiles = tiles + _load_tile(w, scale, zero, rows, block, thread, TILES, K, BITS, GROUP, NATIVE)
    EACH: tl.constexpr = len(tiles) // AHEAD
    let_next_start(PDL)
    wait_for_producer(PDL)
    tokens = ()
    results = ()
    for eight in tl.static_range(EIGHTS):
        tokens = tokens + (tl.minimum(eight * 8 + lane // 4 % 8, M - 1),)
        for i in tl.static_range(2):
            results = results + (tl.minimum(eight * 8 + thread * 2 + i, M - 1),)
    half = M.to(tl.int64) * K
    totals = ()
    for _i in tl.static_range(TILES * EIGHTS * 4):
        totals = totals + (tl.zeros([32 * WARPS], tl.float32),)
    for turn in tl.range(0, TURNS - AHEAD):
        block = begin + turn * STEP
        ahead = tl.minimum(block + AHEAD * STEP, BLOCKS - 1)
        held = tiles[:EACH]
        tiles = tiles[EACH:] + _load_tile(w, scale, zero, rows, ahead, thread, TILES, K, BITS, GROUP, NATIVE)
        totals = _absorb(
            held, totals, digits, group_sums, tokens, results, block, None, thread, half,
            TILES, EIGHTS, K, BITS, GROUP, ZEROS, NATIVE,
        )  # fmt: skip
    for i in tl.static_range(AHEAD):
        block = begin + (TURNS - AHEAD + i) * STEP
        share = None if EVEN else (block < BLOCKS).to(tl.float32)
        totals = _absorb(
            tiles[i * EACH : (i + 1) * EACH], totals, digits, group_sums, tokens, results,
            tl.minimum(block, BLOCKS - 1), share, thread, half,
            TILES, EIGHTS, K, BITS, GROUP, ZEROS, NATIVE,
        )  # fmt: skip
    _finish(
        totals, unit, group_sums, scale, zero, bias, residual, y, partial, arrivals, M, N,
        GROUP, ACTIVATION, GATED, EIGHTS, TILES, ACROSS, DOWN, SPLIT, NATIVE,
    )  # fmt: skip


@triton.jit
def _finish(
    totals, unit, group_sums, scale, zero, bias, residual, y, partial, arrivals, M, N,
    GROUP: tl.constexpr, ACTIVATION: tl.constexpr, GATED: tl.constexpr, EIGHTS: tl.constexpr, TILES: tl.constexpr,
    ACROSS: tl.constexpr, DOWN: tl.constexpr, SPLIT: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Adds up what warps and programs have, and stores results."""
    RESULTS: tl.constexpr = TILES // (2 if GATED else 1)
    COUNT: tl.constexpr = RESULTS * EIGHTS * 4
    SIZE: tl.constexpr = 32 * ACROSS * COUNT
    checked = ()
    for i in tl.static_range(TILES * EIGHTS * 4):
        checked = checked + (in_place(totals[i], NATIVE) if i == 0 else totals[i],)
    gate = _added(checked[:COUNT], COUNT, DOWN, SIZE)
    up = _added(checked[COUNT:], COUNT, DOWN, SIZE) if GATED else gate
    element = tl.arange(0, SIZE)
    value = element % COUNT
    lane = element // COUNT
    row = tl.program_id(0) * (16 * RESULTS * ACROSS) + lane // 32 * (16 * RESULTS)
    row += value // (4 * EIGHTS) * 16 + value // 2 % 2 * 8 + lane % 32 // 4
    token = value // 4 % EIGHTS * 8 + lane % 4 * 2 + value % 2
    last = True
    if SPLIT > 1:
        WIDTH: tl.constexpr = SIZE * (2 if GATED else 1)
        own = partial + tl.program_id(0) * (SPLIT * WIDTH) + element
        tl.store(own + tl.program_id(1) * WIDTH, gate)
        if GATED:
            tl.store(own + tl.program_id(1) * WIDTH + SIZE, up)
        tl.debug_barrier()  # all threads have stored before one of them counts
        last = tl.atomic_add(arrivals + tl.program_id(0), 1, sem="acq_rel") == SPLIT - 1
        if last:
            tl.store(arrivals + tl.program_id(0), 0)
            gate = tl.zeros_like(gate)
            up = tl.zeros_like(up)
            for part in tl.static_range(SPLIT):
                gate += tl.load(own + part * WIDTH, cache_modifier=".cg")
                if GATED:
                    up += tl.load(own + part * WIDTH + SIZE, cache_modifier=".cg")
    if last:
        if GROUP == 0:
            at = tl.minimum(row, N - 1)
            if zero is not None:
                sums = tl.load(group_sums + tl.minimum(token, M - 1))
                gate -= tl.load(zero + at).to(tl.float32) * sums
                if GATED:
                    up -= tl.load(zero + N + at).to(tl.float32) * sums
            gate *= tl.load(scale + at).to(tl.float32)
            if GATED:
                up *= tl.load(scale + N + at).to(tl.float32)
        finish_block(y, bias, residual, row, token, unit, M, N, gate, up, ACTIVATION, GATED)


@triton.jit
def _added(values, COUNT: tl.constexpr, DOWN: tl.constexpr, SIZE: tl.constexpr):
    """Sums of COUNT tensors over the warps that have the same rows: [SIZE], threads' values side by side."""
    whole = tl.reshape(stack(values, COUNT), [DOWN, SIZE])
    if DOWN == 1:
        return tl.reshape(whole, [SIZE])
    else:
        return tl.sum(whole, 0)
