"""One launch: each program dequantizes the row of one token."""

import triton
import triton.language as tl

from optc.compiler.kernels.cuda.primitives import wait_for_producer


@triton.jit
def packed_embedding(
    weight, scale, zero, tokens, y, rows, token_stride,
    K: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr, BITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < K
    wait_for_producer(PDL)
    token = tl.load(tokens + place * token_stride)
    known = (token >= 0) & (token < rows)
    row = tl.where(known, token, 0)
    if BITS == 4:  # a byte holds columns j and j + 16 of 32, see ops/packed/cuda.py
        byte = tl.load(weight + row * (K // 2) + columns // 32 * 16 + columns % 16, mask=inside, other=0).to(tl.int32)
        code = (byte << tl.where(columns % 32 < 16, 28, 24)) >> 28
    else:
        code = tl.load(weight + row * K + columns, mask=inside, other=0).to(tl.int32)
    group = row * (K // GROUP) + columns // GROUP
    values = code.to(tl.float32)
    if zero is not None:
        values -= tl.load(zero + group, mask=inside, other=0).to(tl.float32)
    values *= tl.load(scale + group, mask=inside, other=0.0).to(tl.float32)
    values = tl.where(known, values, float("nan"))
    tl.store(y + place * K + columns, values.to(y.dtype.element_ty), mask=inside)
