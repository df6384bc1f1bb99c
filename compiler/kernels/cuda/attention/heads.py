"""Rows of heads as attention takes them: loaded, normalized, rotated. See `optc::rotary_paged_attention_`."""

from __future__ import annotations

import triton
import triton.language as tl


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
    cos = (tl.cos(angle) * scaling).to(DTYPE).to(tl.float32)
    sin = (tl.sin(angle) * scaling).to(DTYPE).to(tl.float32)
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
