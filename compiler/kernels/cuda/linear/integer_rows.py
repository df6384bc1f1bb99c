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
    """Values OFFSET elements behind `places` [RUNS], as they are stored; those of int8 as int32."""
    kind: tl.constexpr = places.dtype.element_ty
    if NATIVE and kind == tl.int8:
        return tl.inline_asm_elementwise(
            _load_scale_asm("s8", OFFSET), "=r,l", [places], dtype=tl.int32, is_pure=False, pack=1
        )
    elif NATIVE and kind.primitive_bitwidth == 16:
        return tl.inline_asm_elementwise(
            _load_scale_asm("u16", 2 * OFFSET), "=h,l", [places], dtype=places.dtype.element_ty, is_pure=False, pack=1
        )
    elif NATIVE:
        return tl.inline_asm_elementwise(
            _load_scale_asm("b32", 4 * OFFSET), "=f,l", [places], dtype=tl.float32, is_pure=False, pack=1
        )
    else:
        value = tl.load(places + OFFSET)
        return value.to(tl.int32) if kind == tl.int8 else value


@triton.jit
def load_row(
    w, scale, zero, runs, row, ROW: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """Of the row `row` + ROW: the words of some runs, and their scales and zero points, as one tuple; a scale per
    row comes at the end."""
    ROW_WORDS: tl.constexpr = K * BITS // 32
    ROW_GROUPS: tl.constexpr = K // GROUP if GROUP > 0 else 0
    words = _load_words(w + row * ROW_WORDS + runs * RUN, ROW * ROW_WORDS, NATIVE)
    if GROUP > 0:
        groups = runs // (GROUP * BITS // (32 * RUN))
        scales = _load_scales(scale + row * ROW_GROUPS + groups, ROW * ROW_GROUPS, NATIVE)
        if zero is not None:
            zeros = _load_scales(zero + row * ROW_GROUPS + groups, ROW * ROW_GROUPS, NATIVE)
            return words + (scales, zeros)
        else:
            return words + (scales,)
    else:
        return words
