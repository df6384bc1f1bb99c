"""The largest threshold above which enough of a list lies: what top-k and top-p come down to, without sorting."""

from __future__ import annotations

import triton
import triton.language as tl

PIVOTS = tl.constexpr(8)
"""Thresholds that one pass over the list compares with: three bits of the answer."""
UNIT = tl.constexpr(float(1 << 40))
"""Probabilities are summed as multiples of 1 / UNIT of the largest: integers add up to the same in any order."""


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
def weigh(x, top, BY_MASS: tl.constexpr):
    """Integers: of a score with BY_MASS exp(x - top) in units (int64), else 1; 0 of -inf."""
    if BY_MASS:
        return (tl.exp(x - top) * UNIT).to(tl.int64)
    else:
        return (x > float("-inf")).to(tl.int32)


@triton.jit
def threshold(values, count, lowest, highest, target, suffices, top, BY_MASS: tl.constexpr, BLOCK: tl.constexpr):
    """A t from `lowest` to `highest` with target <= measure(values >= t) <= suffices; the largest with the former where
    none has the latter; `lowest` where none has the former.

    The measure sums what `weigh` says. Exact: every float32 number can be the answer, and the order of the list does
    not matter. The first BLOCK of its values are loaded once.
    """
    lane = tl.arange(0, BLOCK)
    step = tl.arange(1, PIVOTS + 1)
    first = tl.load(values + lane, mask=lane < count, other=float("-inf"), cache_modifier=".cg")
    first_weight = weigh(first, top, BY_MASS)
    low = to_key(lowest)
    high = tl.maximum(to_key(highest), low)
    while low < high:
        pivots = low + ((high - low) * step + PIVOTS - 1) // PIVOTS
        bounds = from_key(pivots)
        measure = tl.sum(tl.where(first[None, :] >= bounds[:, None], first_weight[None, :], 0), 1)
        for start in range(BLOCK, count, BLOCK):
            x = tl.load(values + start + lane, mask=start + lane < count, other=float("-inf"), cache_modifier=".cg")
            measure += tl.sum(tl.where(x[None, :] >= bounds[:, None], weigh(x, top, BY_MASS)[None, :], 0), 1)
        enough = tl.sum((measure >= target).to(tl.int32), 0)
        is_best = step == enough
        new_low = tl.max(tl.where(is_best, pivots, low), 0)
        high = tl.min(tl.where(step > enough, pivots - 1, high), 0)
        high = tl.where(tl.max((is_best & (measure <= suffices)).to(tl.int32), 0) > 0, new_low, high)
        low = new_low
    return from_key(low)
