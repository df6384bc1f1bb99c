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
    q = tl.load(w + row * ROW + places, mask=inside, other=0, eviction_policy="evict_first")
    columns = places // 16 * 32 + places % 16 if BITS == 4 else places
    group = row * (K // GROUP) + columns // GROUP
    factor = tl.load(scale + group, mask=inside, other=0.0).to(tl.float32)
    offset = 0.0
    if zero is not None:
        offset = tl.load(zero + group, mask=inside, other=0).to(tl.float32)
    out = y + row * K + columns
    if BITS == 4:
        low, high = (q << 4).to(tl.int8) >> 4, q >> 4
        tl.store(out, ((low.to(tl.float32) - offset) * factor).to(y.dtype.element_ty), mask=inside)
        group_high = row * (K // GROUP) + (columns + 16) // GROUP
        if GROUP % 32 != 0:
            factor = tl.load(scale + group_high, mask=inside, other=0.0).to(tl.float32)
            if zero is not None:
                offset = tl.load(zero + group_high, mask=inside, other=0).to(tl.float32)
        tl.store(out + 16, ((high.to(tl.float32) - offset) * factor).to(y.dtype.element_ty), mask=inside)
    else:
        tl.store(out, ((q.to(tl.float32) - offset) * factor).to(y.dtype.element_ty), mask=inside)
