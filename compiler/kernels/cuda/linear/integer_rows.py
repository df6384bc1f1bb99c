"""Rows of a weight of 4- or 8-bit integers as threads of gemv_integer hold them: in runs of four words.

Through assembly, as everything that is loaded for a run is: Triton's coalescing would take time that grows with the
square of the number of loads, and spread scales over threads that do not use them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from optc.compiler.kernels.cuda.primitives import load_words

RUN = tl.constexpr(4)
"""Words of W whose columns share a scale of the token: 16 bytes, one load of a thread."""


@triton.constexpr_function
def _load_scale_asm(type_name, offset):
    return f"ld.global.nc.{type_name} $0, [$1 + {int(offset)}];"


@triton.jit
def _load_words(w, OFFSET: tl.constexpr, NATIVE: tl.constexpr):
    """The four words of each run, OFFSET words behind `w` [RUNS]: a thread's own."""
    if NATIVE:
        return load_words(w, 4 * OFFSET, True)
    else:
        return tl.load(w + OFFSET), tl.load(w + (OFFSET + 1)), tl.load(w + (OFFSET + 2)), tl.load(w + (OFFSET + 3))


@triton.jit
def _load_scales(places, OFFSET: tl.constexpr, NATIVE: tl.constexpr):
    """Values OFFSET elements behind `places` [RUNS], as float32; those of int8 as int32."""
    kind: tl.constexpr = places.dtype.element_ty
    if NATIVE and kind == tl.int8:
        value = tl.inline_asm_elementwise(
            _load_scale_asm("s8", OFFSET), "=r,l", [places], dtype=tl.int32, is_pure=True, pack=1
        )
    elif NATIVE and kind.primitive_bitwidth == 16:
        value = tl.inline_asm_elementwise(
            _load_scale_asm("u16", 2 * OFFSET), "=h,l", [places], dtype=places.dtype.element_ty, is_pure=True, pack=1
        )
    elif NATIVE:
        value = tl.inline_asm_elementwise(
            _load_scale_asm("b32", 4 * OFFSET), "=f,l", [places], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        value = tl.load(places + OFFSET)
    return value.to(tl.int32 if kind == tl.int8 else tl.float32)


@triton.jit
def _load_row(
    w, scale, zero, runs, row, ROW: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """Of the row `row` + ROW: the words of some runs, their scales and zero points."""
    ROW_WORDS: tl.constexpr = K * BITS // 32
    ROW_GROUPS: tl.constexpr = K // GROUP if GROUP > 0 else 0
    words = _load_words(w + row * ROW_WORDS + runs * RUN, ROW * ROW_WORDS, NATIVE)
    scales = 1.0
    zeros = 0
    if GROUP > 0:
        groups = runs // (GROUP * BITS // (32 * RUN))
        scales = _load_scales(scale + row * ROW_GROUPS + groups, ROW * ROW_GROUPS, NATIVE)
        if zero is not None:
            zeros = _load_scales(zero + row * ROW_GROUPS + groups, ROW * ROW_GROUPS, NATIVE)
    return words, scales, zeros


@triton.jit
def load_tile(
    w, scale, zero, N, rows_left, TILE: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr, RUNS: tl.constexpr, GATED: tl.constexpr, WHOLE: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Tile number TILE of a program: BLOCK_N rows and, where there is a gate, their up rows behind them.

    `w`, `scale` and `zero` point at the program's first row. Rows past the last one are that one again; with WHOLE,
    where there are none, a row is at a distance that the compiler knows. Runs past the last one are that one again,
    and the token is zero there.

    Returns:
        For each row, its words, and scale and zero point of each run; a scale per row comes at the end.
    """
    ROW_RUNS: tl.constexpr = K * BITS // (32 * RUN)
    ROW_GROUPS: tl.constexpr = K // GROUP if GROUP > 0 else 0
    CHUNKS: tl.constexpr = (ROW_RUNS + RUNS - 1) // RUNS
    FIRST_RUN: tl.constexpr = (TILE - TILE // CHUNKS * CHUNKS) * RUNS  # the interpreter has no % here
    FIRST_ROW: tl.constexpr = TILE // CHUNKS * BLOCK_N
    runs = tl.arange(0, RUNS) + FIRST_RUN
    if FIRST_RUN + RUNS > ROW_RUNS:
        runs = tl.minimum(runs, ROW_RUNS - 1)
    tile = ()
    for part in tl.static_range(2 if GATED else 1):
        if part == 1:
            w += N.to(tl.int64) * (ROW_RUNS * RUN)
            if GROUP > 0:
                scale += N * ROW_GROUPS
                if zero is not None:
                    zero += N * ROW_GROUPS
        for i in tl.static_range(BLOCK_N):
            if WHOLE:
                row = _load_row(w, scale, zero, runs, 0, FIRST_ROW + i, K, BITS, GROUP, NATIVE)
            else:
                place = tl.minimum(FIRST_ROW + i, rows_left - 1)
                row = _load_row(w, scale, zero, runs, place, 0, K, BITS, GROUP, NATIVE)
            tile = tile + (row,)
    return tile
