"""Products of small matrices of signed bytes by one warp, whose threads hold them in registers: `mma.sync`.

A matrix is spread over the 32 threads of a warp as PTX says of m16n8k32: thread 4 g + t has of A [16, 32] the bytes
4 t .. 4 t + 3 of row g, of row g + 8, and the same bytes + 16 of both; of B [32, 8] those of column g; of C [16, 8]
columns 2 t and 2 t + 1 of row g, and of row g + 8. In a tensor of a word per thread, element i is thread i's.
"""

from __future__ import annotations

import triton
import triton.language as tl

from optc.compiler.kernels.cuda.primitives import dot_bytes, load_words


@triton.jit
def load_once(places, NATIVE: tl.constexpr):
    """Four words behind each of `places` (aligned to 16 bytes), int32: past the first cache, with their neighbours into
    the second."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "ld.global.L1::no_allocate.L2::128B.v4.b32 {$0, $1, $2, $3}, [$4];", "=r,=r,=r,=r,l", [places],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1,
        )  # fmt: skip
    else:
        return _words(places)


@triton.jit
def load_again(places, NATIVE: tl.constexpr):
    """The same of what other warps load too: through both caches."""
    if NATIVE:
        return load_words(places, 0, False)
    else:
        return _words(places)


@triton.jit
def _words(places):
    words = places.to(tl.pointer_type(tl.int32))
    return tl.load(words), tl.load(words + 1), tl.load(words + 2), tl.load(words + 3)


@triton.jit
def multiply(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3, NATIVE: tl.constexpr):
    """A B + C, as four words per thread like C."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
            "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
            "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r", [a0, a1, a2, a3, b0, b1, c0, c1, c2, c3],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1,
        )  # fmt: skip
    else:
        d0, d1 = _rows(a0, a2, b0, b1)
        d2, d3 = _rows(a1, a3, b0, b1)
        return c0 + d0, c1 + d1, c2 + d2, c3 + d3


@triton.jit
def _rows(a, behind, b0, b1):
    """Eight rows of A B: columns 2 t and 2 t + 1."""
    WARPS: tl.constexpr = a.shape[0] // 32
    products = tl.zeros([WARPS, 8, 8, 4], tl.int32)
    products = dot_bytes(_of_rows(a), _of_columns(b0), products, False)
    products = dot_bytes(_of_rows(behind), _of_columns(b1), products, False)
    even, odd = tl.split(tl.reshape(tl.sum(products, 3), [WARPS, 8, 4, 2]))
    return tl.reshape(even, a.shape), tl.reshape(odd, a.shape)


@triton.jit
def _of_rows(words):
    return tl.reshape(words, [words.shape[0] // 32, 8, 1, 4])


@triton.jit
def _of_columns(words):
    return tl.reshape(words, [words.shape[0] // 32, 1, 8, 4])


@triton.jit
def low_nibbles(word):
    """Sixteen times the low nibbles of four bytes, as signed bytes."""
    return (word << 4) & -252645136  # 0xF0F0F0F0


@triton.jit
def high_nibbles(word):
    """Sixteen times the high nibbles of four bytes, as signed bytes."""
    return word & -252645136


@triton.jit
def in_place(values, NATIVE: tl.constexpr):
    """The same; NaN where element i is not thread i's, which everything here relies on."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "{ .reg .pred moved; .reg .b32 thread; mov.b32 thread, %tid.x; setp.ne.b32 moved, thread, $2; "
            "selp.f32 $0, 0f7FFFFFFF, $1, moved; }",
            "=f,f,r", [values, tl.arange(0, values.shape[0])], dtype=tl.float32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        return values


@triton.jit
def stack(values, COUNT: tl.constexpr):
    """COUNT tensors [n], a power of two, as one [n, 2, ..., 2], where the last axis is the lowest bit."""
    if COUNT >= 2:
        joined = ()
        for i in tl.static_range(COUNT // 2):
            joined = joined + (tl.join(values[i], values[i + COUNT // 2]),)
        return stack(joined, COUNT // 2)
    else:
        return values[0]
