"""The largest threshold above which enough of a list lies: what top-k and top-p come down to, without sorting."""

from __future__ import annotations

import triton
import triton.language as tl

PIVOTS = tl.constexpr(16)
"""Thresholds that one pass over the list compares with: four bits of the answer."""


@triton.jit
def to_key(x):
    """Integers (int64) in the order of float32 numbers."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # -0.0 becomes 0.0, which is equal
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def from_key(key):
    """The inverse of `to_key`."""
    word = key.to(tl.int32)
    return (word ^ ((word >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def threshold(values, count, lowest, highest, target, top, BY_MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest t from `lowest` to `highest` with measure(values >= t) >= target; `lowest` where there is none.

    The measure counts, or with BY_MASS sums exp(value - top). Exact: every float32 number can be the answer.
    """
    lane = tl.arange(0, BLOCK)
    step = tl.arange(1, PIVOTS + 1)
    low = to_key(lowest)
    high = tl.maximum(to_key(highest), low)
    while low < high:
        pivots = low + ((high - low) * step + PIVOTS - 1) // PIVOTS
        bounds = from_key(pivots)
        parts = tl.zeros([PIVOTS, BLOCK], tl.float32)  # summed across threads once, not in each step
        for start in range(0, count, BLOCK):
            inside = start + lane < count
            x = tl.load(values + start + lane, mask=inside, other=float("-inf"), cache_modifier=".cg")
            weight = tl.exp(x - top) if BY_MASS else inside.to(tl.float32)
            parts += tl.where(x[None, :] >= bounds[:, None], weight[None, :], 0.0)
        measure = tl.sum(parts, 1)
        enough = tl.sum((measure >= target).to(tl.int32), 0)
        new_low = tl.max(tl.where(step <= enough, pivots, low), 0)
        high = tl.min(tl.where(step > enough, pivots - 1, high), 0)
        low = new_low
    return from_key(low)
