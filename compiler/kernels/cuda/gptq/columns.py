"""One launch for a block of columns: rows of the weight do not depend on each other, and their gaps stay in registers."""

import triton
import triton.language as tl

ROUNDER = tl.constexpr(12582912.0)
"""1.5 * 2^23: added to a number below 2^21 and taken away again, it leaves the number rounded, halves to even."""


@triton.jit(do_not_specialize=["count"])
def round_columns(
    block, target, asks, scale, zero, codes, gaps, count, rows, top, C: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Codes and gaps [count, rows] of a block [count, rows] on a grid [count, rows].

    `asks` [count, count] holds in row i what column i is asked for by each gap before it, and 0 from column i on.
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = row < rows
    earlier = tl.arange(0, C)
    kept = tl.zeros([C, BLOCK], tl.float32)
    for i in range(0, count):
        place = i * rows + row
        weight = tl.load(asks + i * count + earlier, mask=earlier < count, other=0.0)
        wanted = tl.load(target + place, mask=inside, other=0.0) + tl.sum(kept * weight[:, None], 0)
        step = tl.load(scale + place, mask=inside, other=1.0)
        middle = tl.load(zero + place, mask=inside, other=0.0)
        ratio = tl.minimum(tl.maximum(tl.div_rn(wanted, step) + middle, -1.0), top + 1.0)
        code = tl.minimum(tl.maximum((ratio + ROUNDER) - ROUNDER, 0.0), top)
        gap = tl.load(block + place, mask=inside, other=0.0) - (code - middle) * step
        tl.store(codes + place, code, mask=inside)
        tl.store(gaps + place, gap, mask=inside)
        kept = tl.where((earlier == i)[:, None], gap[None, :], kept)
