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
    GROUPS: tl.constexpr = K // GROUP
    row = tl.program_id(0).to(tl.int64)
    places = tl.minimum(tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), ROW - 1)  # the last one again past the end
    q = tl.load(w + row * ROW + places, eviction_policy="evict_first")
    if BITS == 4:
        columns = places // 16 * 32 + places % 16
        _store(y, scale, zero, row, columns, (q << 4).to(tl.int8) >> 4, K, GROUP, GROUPS)
        _store(y, scale, zero, row, columns + 16, q >> 4, K, GROUP, GROUPS)
    else:
        _store(y, scale, zero, row, places, q, K, GROUP, GROUPS)


@triton.jit
def _store(y, scale, zero, row, columns, codes, K: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr):
    values = codes.to(tl.float32)
    group = row * GROUPS + columns // GROUP
    if zero is not None:
        values -= tl.load(zero + group).to(tl.float32)
    values *= tl.load(scale + group).to(tl.float32)
    tl.store(y + row * K + columns, values.to(y.dtype.element_ty))
