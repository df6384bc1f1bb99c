"""One launch: each program holds a row in registers, and reads it once."""

import triton
import triton.language as tl

from optc.compiler.kernels.cuda.primitives import wait_for_producer


@triton.jit
def fused_norm(
    x, weight, bias, residual, y, row_stride, eps, factor,
    K: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < K
    if weight is not None:
        scale = tl.load(weight + columns, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        shift = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    wait_for_producer(PDL)
    values = tl.load(x + row * row_stride + columns, mask=inside, other=0.0).to(tl.float32)
    if NORM == "layer":
        values = tl.where(inside, values - tl.sum(values, 0) / K, 0.0)
    if NORM != "":
        values *= 1.0 / tl.sqrt(tl.sum(values * values, 0) / K + eps)
    if weight is not None:
        values *= scale
    if bias is not None:
        values += shift
    values *= factor
    if residual is not None:
        values += tl.load(residual + row * K + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * K + columns, values.to(y.dtype.element_ty), mask=inside)
