"""Tokens rounded to E4M3 behind their norm, each by its own scale, in one launch: inputs of products of codes."""

from __future__ import annotations

import triton
import triton.language as tl

from optc.compiler.kernels.cuda.primitives import KEEP_NAN, load_normalized, nan_maximum

LARGEST = tl.constexpr(448.0)
LEAST_SCALE = tl.constexpr(2.0**-126)

SMALLEST_NORMAL = tl.constexpr(2.0**-6)
MAGNET = tl.constexpr(1.5 * 2.0**23)


@triton.jit
def nearest_code(v):
    """float32 values of at most LARGEST -> the E4M3 numbers nearest to them, ties to even, as float32.

    The exponent of v gives the distance of its neighbours, and adding so many of them that a float32 holds no less than
    one rounds. Triton's interpreter loses what carries into the exponent when it converts.
    """
    power = (v.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    magnet = tl.maximum(power, SMALLEST_NORMAL) * (MAGNET / 8)
    return (v + magnet) - magnet


@triton.jit
def round_tokens(
    x, norm_weight, norm_bias, y, unit, eps,
    K: tl.constexpr, NORM: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token per program; BLOCK_K is a power of two from K on.

    As `ops.packed.cuda.round_tokens` has it: the norm's result takes the type of x before its scale is found.

    Args:
        y: float8 [M, K], codes, with unit float32 [M], what 1 stands for; or of x's type, codes times their unit, with
            unit None.
    """
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_K)
    inside = columns < K
    values = load_normalized(x + token * K, norm_weight, norm_bias, eps, K, NORM, BLOCK_K, PDL)
    values = tl.where(inside, values, 0.0).to(x.dtype.element_ty).to(tl.float32)
    largest = tl.reduce(tl.abs(values), 0, nan_maximum)
    scale = nan_maximum(tl.div_rn(largest, LARGEST), LEAST_SCALE)
    inverse = tl.div_rn(1.0, scale)
    codes = nearest_code(tl.clamp(values * inverse, -LARGEST, LARGEST, propagate_nan=KEEP_NAN))
    if unit is not None:
        tl.store(y + token * K + columns, codes.to(tl.float8e4nv), mask=inside)
        tl.store(unit + token, scale)
    else:
        tl.store(y + token * K + columns, (codes * scale).to(y.dtype.element_ty), mask=inside)
