"""Packed weights to the compute type, for products by cuBLAS: one read of the codes, one write."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def dequantize_rows(
    w, scale, zero, y, N, K: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """y [N, K] = (w - zero) * scale, rounded once.

    Args:
        w: int8 or float8 [N, K], or int8 [N, K/2] for 4 bits (layout: ops/packed/cuda.py). BLOCK: its elements per
            program, along a row.
        scale, zero: [N, K / GROUP]; GROUP is K for a scale per row.
    """
    ROW: tl.constexpr = K * BITS // 8
    row = tl.program_id(0).to(tl.int64)
    places = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = places < ROW
    q = tl.load(w + row * ROW + places, mask=inside, eviction_policy="evict_first")
    if BITS == 4:
        columns = places // 16 * 32 + places % 16
        _store(y, scale, zero, row, columns, inside, (q << 4).to(tl.int8) >> 4, K, GROUP)
        _store(y, scale, zero, row, columns + 16, inside, q >> 4, K, GROUP)
    else:
        _store(y, scale, zero, row, places, inside, q, K, GROUP)


@triton.jit
def _store(y, scale, zero, row, columns, inside, codes, K: tl.constexpr, GROUP: tl.constexpr):
    values = codes.to(tl.float32)
    group = row * (K // GROUP) + columns // GROUP
    if zero is not None:
        values -= tl.load(zero + group, mask=inside).to(tl.float32)
    values *= tl.load(scale + group, mask=inside).to(tl.float32)
    tl.store(y + row * K + columns, values.to(y.dtype.element_ty), mask=inside)
