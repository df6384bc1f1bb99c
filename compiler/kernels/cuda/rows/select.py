"""One launch. The index may come from the kernel before, and so may the rows: nothing is read ahead of it."""

import triton
import triton.language as tl

from optc.compiler.kernels.cuda.primitives import wait_for_producer


@triton.jit(do_not_specialize=["count"])  # of tokens, where rows are of a prompt
def select_rows(
    rows, indices, y, count, row_stride, factor, C: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """y[i] = rows[indices[i]] * factor, a part of a row in each program; NaN where there is no such row."""
    place = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < C
    wait_for_producer(PDL)
    index = tl.load(indices + place)
    there = (index >= 0) & (index < count)
    values = tl.load(rows + index * row_stride + columns, mask=inside & there, other=float("nan")).to(tl.float32)
    tl.store(y + place * C + columns, (values * factor).to(y.dtype.element_ty), mask=inside)
