"""Queries or keys after norm and rotary embedding, as a tensor of their own: for attention by a library."""

from __future__ import annotations

import triton
import triton.language as tl

from optc.compiler.kernels.cuda.attention.heads import load_heads, rotation
from optc.compiler.kernels.cuda.primitives import wait_for_producer


@triton.jit
def turn_heads(
    source, position, inv_freq, norm, out, source_token, source_head, scaling, eps,
    HEADS: tl.constexpr, HEAD_ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROTATED: tl.constexpr,
    INTERLEAVED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [tokens, HEADS, D], a token per program; HEAD_ROWS is HEADS padded to a power of two. See `write`."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEAD_ROWS)
    there = head < HEADS
    where = tl.load(position + token + tl.zeros([1], tl.int32))
    cos, sin = rotation(where, inv_freq, scaling, source.dtype.element_ty, WIDTH, ROTATED, INTERLEAVED)
    wait_for_producer(PDL)
    rows = load_heads(
        source, token * source_token + head * source_head, there, cos, sin, norm, eps, D, WIDTH, ROTATED, INTERLEAVED
    )  # fmt: skip
    feature = tl.arange(0, WIDTH)[None, :]
    places = out + ((token * HEADS + head) * D)[:, None] + feature
    tl.store(places, rows, mask=there[:, None] & (feature < D))
