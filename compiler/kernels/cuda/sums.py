"""Sums of many tensors over the threads of a program at once."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def _fold_asm(bit):
    return f"""{{
        .reg .pred second;
        .reg .b32 lane;
        .reg .f32 kept, sent, got;
        mov.b32 lane, %laneid;
        and.b32 lane, lane, {int(bit)};
        setp.ne.b32 second, lane, 0;
        selp.f32 kept, $2, $1, second;
        selp.f32 sent, $1, $2, second;
        shfl.sync.bfly.b32 got, sent, {int(bit)}, 31, -1;
        add.f32 $0, kept, got;
    }}"""


@triton.constexpr_function
def _checked_asm():
    return """{
        .reg .pred moved;
        .reg .b32 lane, place;
        mov.b32 lane, %laneid;
        and.b32 place, $2, 31;
        setp.ne.b32 moved, lane, place;
        selp.f32 $0, 0f7FFFFFFF, $1, moved;
    }"""


@triton.jit
def _fold(values, COUNT: tl.constexpr, BIT: tl.constexpr):
    """Halves the number of tensors until there is one or BIT is 0: lanes with BIT go on with the second of a pair."""
    if COUNT >= 2 and BIT > 0:
        folded = ()
        for i in tl.static_range(COUNT // 2):
            folded = folded + (
                tl.inline_asm_elementwise(
                    _fold_asm(BIT), "=f,f,f", [values[i], values[i + COUNT // 2]],
                    dtype=tl.float32, is_pure=False, pack=1,
                ),
            )  # fmt: skip
        return _fold(folded, COUNT // 2, BIT // 2)
    else:
        return values


@triton.constexpr_function
def _swap_asm(bit):
    return f"{{ .reg .f32 got; shfl.sync.bfly.b32 got, $1, {int(bit)}, 31, -1; add.f32 $0, $1, got; }}"


@triton.jit
def _spread(value, BIT: tl.constexpr):
    """Sums over the lanes that differ in BIT and lower bits, in each of them."""
    if BIT > 0:
        both = tl.inline_asm_elementwise(_swap_asm(BIT), "=f,f", [value], dtype=tl.float32, is_pure=False, pack=1)
        return _spread(both, BIT // 2)
    else:
        return value


@triton.jit
def _over_lanes(values, COUNT: tl.constexpr, WIDTH: tl.constexpr, WARPS: tl.constexpr):
    """For each lane of each warp [32 * WARPS], the sum of tensor number lane * COUNT / 32 over that warp's elements."""
    LANES: tl.constexpr = 32 * WARPS
    lane_sums = ()
    for i in tl.static_range(COUNT):
        if WIDTH > LANES:
            lane_sums = lane_sums + (tl.sum(tl.reshape(values[i], [WIDTH // LANES, LANES]), 0),)
        else:
            lane_sums = lane_sums + (values[i],)
    return _spread(_fold(lane_sums, COUNT, 16)[0], 16 // COUNT)


@triton.jit
def _add_two(a, b, other_a, other_b):
    return a + other_a, b + other_b


@triton.jit
def _add_three(a, b, c, other_a, other_b, other_c):
    return a + other_a, b + other_b, c + other_c


@triton.jit
def _add_four(a, b, c, d, other_a, other_b, other_c, other_d):
    return a + other_a, b + other_b, c + other_c, d + other_d


@triton.jit
def sum_rows(values, others, COUNT: tl.constexpr, WIDTH: tl.constexpr, WARPS: tl.constexpr, NATIVE: tl.constexpr):
    """Sums of the float32 tensors [WIDTH] of `values`, and of one of each of `others`.

    COUNT, a power of two up to 32, tensors are in each tuple of `values`, one to three tuples of which there are; WIDTH is
    a power of two and at least 32 * WARPS.

    Returns:
        for each tuple, [32]: that of tensor number place * COUNT / 32. For each of `others` [32]: its sum, everywhere.

    A sum over the lanes of a warp costs five shuffles for each tensor; here lanes share out the tensors while they sum,
    which costs one for each, about (the reduce-scatter of Rabenseifner 2004, in a warp). Warps meet once, for all. It takes
    a layout for granted in which lane l holds element l of 32: were it another one, the sums would be NaN.
    """
    sums = ()
    if NATIVE:
        for tensors in tl.static_range(len(values)):
            sums = sums + (_over_lanes(values[tensors], COUNT, WIDTH, WARPS),)
        for i in tl.static_range(len(others)):
            sums = sums + (_over_lanes((others[i],), 1, WIDTH, WARPS),)
        first = tl.inline_asm_elementwise(
            _checked_asm(), "=f,f,r", [sums[0], tl.arange(0, 32 * WARPS)], dtype=tl.float32, is_pure=False, pack=1
        )
        sums = (first,) + sums[1:]
        TENSORS: tl.constexpr = len(values) + len(others)
        parts = ()
        for i in tl.static_range(TENSORS):
            parts = parts + (tl.reshape(sums[i], [WARPS, 32]),)
        if TENSORS == 1:
            return (tl.sum(parts[0], 0),)
        elif TENSORS == 2:
            return tl.reduce(parts, 0, _add_two)
        elif TENSORS == 3:
            return tl.reduce(parts, 0, _add_three)
        else:
            return tl.reduce(parts, 0, _add_four)
    else:
        lane = tl.arange(0, 32)
        for tensors in tl.static_range(len(values)):
            total = tl.zeros([32], tl.float32)
            for i in tl.static_range(COUNT):
                total = tl.where(lane * COUNT // 32 == i, tl.sum(values[tensors][i], 0), total)
            sums = sums + (total,)
        for i in tl.static_range(len(others)):
            sums = sums + (tl.sum(others[i], 0) + tl.zeros([32], tl.float32),)
        return sums
