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


@triton.jit
def _stack(values, COUNT: tl.constexpr):
    """COUNT tensors [n], a power of two, as one [n, 2, ..., 2], where the last axis is the lowest bit."""
    if COUNT >= 2:
        joined = ()
        for i in tl.static_range(COUNT // 2):
            joined = joined + (tl.join(values[i], values[i + COUNT // 2]),)
        return _stack(joined, COUNT // 2)
    else:
        return values[0]


@triton.jit
def sum_rows(values, COUNT: tl.constexpr, WIDTH: tl.constexpr, WARPS: tl.constexpr, NATIVE: tl.constexpr):
    """Sums of COUNT float32 tensors [WIDTH], both powers of two and WIDTH at least 32 * WARPS: [COUNT].

    A sum over the lanes of a warp costs five shuffles for each tensor; here lanes share out the tensors while they sum,
    which costs one for each, about (the reduce-scatter of Rabenseifner 2004, in a warp). It takes a layout for granted
    in which lane l holds element l of 32: were it another one, the sums would be NaN.
    """
    if NATIVE:
        LANES: tl.constexpr = 32 * WARPS
        lane_sums = ()
        for i in tl.static_range(COUNT):
            if WIDTH > LANES:
                lane_sums = lane_sums + (tl.sum(tl.reshape(values[i], [WIDTH // LANES, LANES]), 0),)
            else:
                lane_sums = lane_sums + (values[i],)
        SHARES: tl.constexpr = min(COUNT, 32)
        place = tl.arange(0, LANES)
        checked = ()
        folded = _fold(lane_sums, COUNT, 16)
        for i in tl.static_range(COUNT // SHARES):
            checked = checked + (
                tl.inline_asm_elementwise(
                    _checked_asm(), "=f,f,r", [folded[i], place], dtype=tl.float32, is_pure=False, pack=1
                ),
            )
        whole = tl.reshape(_stack(checked, COUNT // SHARES), [WARPS, SHARES, 32 // SHARES, COUNT // SHARES])
        return tl.reshape(tl.sum(tl.sum(whole, 2), 0), [COUNT])
    else:
        return tl.reshape(tl.sum(_stack(values, COUNT), 0), [COUNT])
