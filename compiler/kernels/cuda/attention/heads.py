"""Rows of heads as attention takes them: loaded, normalized, rotated. See `optc::rotary_paged_attention_`."""

from __future__ import annotations

import triton
import triton.language as tl

TWO_OVER_PI = tl.constexpr(0.6366197723675814)
HALF_PI = tl.constexpr((1.5703125, 4.837512969970703e-4, 7.549789948768648e-8))
"""pi / 2 as a sum of three numbers (Cody and Waite 1980), the first of which is exact times any whole number that
matters: what it leaves is exact as well."""


@triton.jit
def cos_sin(angle):
    """cos and sin of angles of up to some millions, within 2e-7. tl.cos brings code for all numbers, a hundred times
    as long, into every element.

    Reduced to an eighth of a turn around a multiple n of pi / 2; polynomials of Cephes (Moshier 1989).
    """
    n = tl.floor(angle * TWO_OVER_PI + 0.5)
    x = tl.fma(n, -HALF_PI[0], angle)
    x = tl.fma(n, -HALF_PI[1], x)
    x = tl.fma(n, -HALF_PI[2], x)
    square = x * x
    sin = tl.fma(tl.fma(-1.9515295891e-4, square, 8.3321608736e-3), square, -1.6666654611e-1)
    sin = tl.fma(sin * square, x, x)
    cos = tl.fma(tl.fma(2.443315711809948e-5, square, -1.388731625493765e-3), square, 4.166664568298827e-2)
    cos = tl.fma(cos * square, square, tl.fma(-0.5, square, 1.0))
    quarter = n.to(tl.int32) & 3
    is_odd = (quarter & 1) != 0
    first = tl.where(is_odd, sin, cos)
    second = tl.where(is_odd, cos, sin)
    return tl.where((quarter == 1) | (quarter == 2), -first, first), tl.where(quarter >= 2, -second, second)


@triton.jit
def rotation(
    position, inv_freq, scaling, DTYPE: tl.constexpr,
    WIDTH: tl.constexpr, ROTATED: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """cos and signed sin, float32 [rows, WIDTH], of positions [rows]; 1 and 0 for features that pass.

    Rounded to the type of the heads, as `optc::rotary` does.
    """
    feature = tl.arange(0, WIDTH)
    if INTERLEAVED:
        pair = feature // 2
        is_first = feature % 2 == 0
    else:
        pair = feature % (ROTATED // 2)
        is_first = feature < ROTATED // 2
    turns = (feature < ROTATED)[None, :]
    frequency = tl.load(inv_freq + pair, mask=feature < ROTATED, other=0.0)
    angle = position.to(tl.float32)[:, None] * frequency[None, :]
    cos, sin = cos_sin(angle)
    cos = (cos * scaling).to(DTYPE).to(tl.float32)
    sin = (sin * scaling).to(DTYPE).to(tl.float32)
    signed = tl.where(is_first[None, :], -sin, sin)
    return tl.where(turns, cos, 1.0), tl.where(turns, signed, 0.0)


@triton.jit
def load_heads(
    source, offset, mask, cos, sin, norm, eps,
    D: tl.constexpr, WIDTH: tl.constexpr, ROTATED: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Heads [rows, WIDTH] at source + offset [rows], zeros beyond D and where not `mask` [rows], in source's type.

    With a weight `norm` [D] RMS-normalized over D; with ROTATED features turned by `rotation`'s cos and sin.
    """
    feature = tl.arange(0, WIDTH)
    inside = mask[:, None] & (feature < D)[None, :]
    places = source + offset[:, None]
    rows = tl.load(places + feature[None, :], mask=inside, other=0.0)
    if norm is not None or ROTATED > 0:
        x = rows.to(tl.float32)
        if norm is not None:
            inverse = 1.0 / tl.sqrt(tl.sum(x * x, 1) / D + eps)
            gain = tl.load(norm + feature, mask=feature < D, other=0.0).to(tl.float32)
            x = (x * inverse[:, None] * gain[None, :]).to(rows.dtype).to(tl.float32)
        if ROTATED > 0:
            if INTERLEAVED:
                other = feature ^ 1
            else:
                other = (feature + ROTATED // 2) % ROTATED
            other = tl.where(feature < ROTATED, other, feature)
            partner = tl.load(places + other[None, :], mask=inside, other=0.0).to(tl.float32)
            if norm is not None:
                gain = tl.load(norm + other, mask=feature < D, other=0.0).to(tl.float32)
                partner = (partner * inverse[:, None] * gain[None, :]).to(rows.dtype).to(tl.float32)
            x = x * cos + partner * sin
        rows = x.to(rows.dtype)
    return rows
