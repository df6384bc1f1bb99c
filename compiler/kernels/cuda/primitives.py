"""What kernels share: dependent launch, activations, statistics of a norm, products of packed bytes.

NATIVE says whether code for a GPU is made; Triton's interpreter knows neither inline assembly nor dependent launch.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

KEEP_NAN = tl.constexpr(tl.PropagateNan.ALL)
LEVELS = tl.constexpr(32512.0)
"""Largest magnitude of a 16-bit fixed-point number whose two digits of base 256 are signed bytes."""
ROUNDER = tl.constexpr(12582912.0 + 128.0)
"""1.5 * 2^23 + 128: added to a number below 2^21, it leaves the number, rounded, plus 128 in the low bits."""
SMALLEST = tl.constexpr(1e-30)


@triton.jit
def wait_for_producer(PDL: tl.constexpr):
    """Wait until all that earlier kernels of the stream wrote is visible; let the next kernel start its loads.

    With programmatic dependent launch a kernel begins before its predecessor has ended. Weights may be read before
    this, anything that a kernel wrote only after it.

    Returns:
        A zero that is known only after the wait. A pointer that it is added to cannot be read earlier, by assembly
        that the compiler is free to move.
    """
    if PDL:
        zero = tl.inline_asm_elementwise(
            "griddepcontrol.wait; mov.b32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
        )
        gdc_launch_dependents()
        return zero
    else:
        return 0


@triton.constexpr_function
def _prefetch_asm(size):
    return (
        "{ .reg .u64 a; cvta.to.global.u64 a, $1; "
        f"cp.async.bulk.prefetch.L2.global [a], {int(size)}; mov.b32 $0, 0; }}"
    )


@triton.jit
def prefetch(pointers, BYTES: tl.constexpr):
    """Ask for BYTES (a multiple of 16) from each of `pointers` on, into the second-level cache."""
    tl.inline_asm_elementwise(_prefetch_asm(BYTES), "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def activate(v, KIND: tl.constexpr):
    if KIND == "silu":
        return v / (1.0 + tl.exp(-v))
    elif KIND == "gelu":
        return 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))
    elif KIND == "gelu_tanh":  # 0.5 (1 + tanh u) = 1 / (1 + exp(-2u))
        return v / (1.0 + tl.exp(-1.5957691216057308 * (v + 0.044715 * v * v * v)))
    elif KIND == "relu":
        return tl.where(v < 0.0, 0.0, v)
    else:
        return v


@triton.jit
def layer_statistics(x, eps, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Mean and 1 / sqrt(variance + eps) of x [K], in two passes: the difference of squares would cancel."""
    columns = tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_K], tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        total += tl.load(x + start + columns, mask=start + columns < K, other=0.0).to(tl.float32)
    mean = tl.sum(total, 0) / K
    squares = tl.zeros([BLOCK_K], tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        inside = start + columns < K
        centred = tl.load(x + start + columns, mask=inside, other=0.0).to(tl.float32) - mean
        squares += tl.where(inside, centred * centred, 0.0)
    return mean, 1.0 / tl.sqrt(tl.sum(squares, 0) / K + eps)


@triton.jit
def inverse_root_mean_square(x, eps, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """1 / sqrt(mean of squares + eps) of x [K]."""
    columns = tl.arange(0, BLOCK_K)
    squares = tl.zeros([BLOCK_K], tl.float32)
    for start in tl.static_range(0, K, BLOCK_K):
        values = tl.load(x + start + columns, mask=start + columns < K, other=0.0).to(tl.float32)
        squares += values * values
    return 1.0 / tl.sqrt(tl.sum(squares, 0) / K + eps)


@triton.jit
def store_rows(y, bias, residual, rows, N, gate, up, ACTIVATION: tl.constexpr, GATED: tl.constexpr):
    """y[rows] = activation(gate + bias) [* (up + bias)] + residual, for rows below N."""
    inside = rows < N
    if bias is not None:
        gate += tl.load(bias + rows, mask=inside, other=0.0).to(tl.float32)
    gate = activate(gate, ACTIVATION)
    if GATED:
        if bias is not None:
            up += tl.load(bias + N + rows, mask=inside, other=0.0).to(tl.float32)
        gate *= up
    if residual is not None:
        gate += tl.load(residual + rows, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + rows, gate.to(y.dtype.element_ty), mask=inside)


@triton.constexpr_function
def _permute_bytes_asm(selector):
    return f"prmt.b32 $0, $1, $2, {int(selector)};"


@triton.jit
def permute_bytes(a, b, SELECTOR: tl.constexpr, NATIVE: tl.constexpr):
    """The word whose byte i is byte (SELECTOR >> 4i) & 7 of the eight bytes of a, then b."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            _permute_bytes_asm(SELECTOR), "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        result = tl.zeros_like(a)
        for i in tl.static_range(4):
            place = (SELECTOR >> (4 * i)) & 7
            word = a if place < 4 else b
            result |= ((word >> (8 * (place % 4))) & 255) << (8 * i)
        return result


@triton.jit
def dot_bytes(a, b, c, NATIVE: tl.constexpr):
    """c + the sum over four bytes, signed, of a * b."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        for i in tl.static_range(4):
            c += ((a << (24 - 8 * i)) >> 24) * ((b << (24 - 8 * i)) >> 24)
        return c


@triton.jit
def nan_maximum(a, b):
    return tl.maximum(a, b, propagate_nan=KEEP_NAN)


@triton.jit
def load_quad(pointer, quads, inside, NATIVE: tl.constexpr):
    """Elements 4 q to 4 q + 3 for each q of `quads`, as `unpack_quad` takes them; zeros where not `inside`, if given.

    Through assembly for 16-bit types: each thread loads the quads that it works on, eight bytes each, where tl.load of
    a tile [quads, 4] would bring them in another layout and exchange them through shared memory. The compiler may move
    an assembly that is called pure as far as its operands allow: see `wait_for_producer`.
    """
    if NATIVE and pointer.dtype.element_ty.primitive_bitwidth == 16:
        places = pointer.to(tl.pointer_type(tl.int64)) + (quads if inside is None else tl.where(inside, quads, 0))
        first, second = tl.inline_asm_elementwise(
            "ld.global.v2.b32 {$0, $1}, [$2];", "=r,=r,l", [places], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
        )
        if inside is not None:
            first, second = tl.where(inside, first, 0), tl.where(inside, second, 0)
        return first, second
    else:
        first = tl.load(pointer + quads * 4, mask=inside)
        second = tl.load(pointer + quads * 4 + 1, mask=inside)
        third = tl.load(pointer + quads * 4 + 2, mask=inside)
        fourth = tl.load(pointer + quads * 4 + 3, mask=inside)
        if inside is not None:
            zero = tl.zeros_like(first)
            first, second = tl.where(inside, first, zero), tl.where(inside, second, zero)
            third, fourth = tl.where(inside, third, zero), tl.where(inside, fourth, zero)
        return first, second, third, fourth


@triton.jit
def _unpack_pair(pair, TYPE: tl.constexpr):
    """The low and the high half of a word as float32."""
    if tl.bfloat16 == TYPE:
        return (pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True)
    else:
        low = pair.to(tl.int16).to(TYPE, bitcast=True).to(tl.float32)
        return low, (pair >> 16).to(tl.int16).to(TYPE, bitcast=True).to(tl.float32)


@triton.jit
def unpack_quad(quad, TYPE: tl.constexpr):
    """Four float32 tensors of what load_quad brought from a pointer to TYPE."""
    if len(quad) == 2:
        return _unpack_pair(quad[0], TYPE) + _unpack_pair(quad[1], TYPE)
    else:
        return quad[0].to(tl.float32), quad[1].to(tl.float32), quad[2].to(tl.float32), quad[3].to(tl.float32)


@triton.jit
def quad_magnitude(quad):
    return nan_maximum(nan_maximum(tl.abs(quad[0]), tl.abs(quad[1])), nan_maximum(tl.abs(quad[2]), tl.abs(quad[3])))


@triton.jit
def quad_digits(quad, factor, NATIVE: tl.constexpr):
    """Words of four signed bytes each, low and high digits: round(v * factor) = 256 * high + low."""
    w0 = (quad[0] * factor + ROUNDER).to(tl.int32, bitcast=True)
    w1 = (quad[1] * factor + ROUNDER).to(tl.int32, bitcast=True)
    w2 = (quad[2] * factor + ROUNDER).to(tl.int32, bitcast=True)
    w3 = (quad[3] * factor + ROUNDER).to(tl.int32, bitcast=True)
    first = permute_bytes(w0, w1, 0x5140, NATIVE)
    second = permute_bytes(w2, w3, 0x5140, NATIVE)
    low = permute_bytes(first, second, 0x5410, NATIVE) ^ -2139062144  # 0x80808080 takes the 128 off again
    return low, permute_bytes(first, second, 0x7632, NATIVE)


@triton.jit
def store_block(
    y, bias, residual, partial, arrivals, rows, tokens, M, N, gate, up, ACTIVATION: tl.constexpr,
    GATED: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """y[tokens, rows] of sums [rows, tokens] that SPLIT programs share; see product_integer."""
    inside = (rows < N)[:, None] & (tokens < M)[None, :]
    places = tokens.to(tl.int64)[None, :] * N + rows[:, None]
    last = True
    if SPLIT > 1:
        plane = M.to(tl.int64) * N
        own = partial + tl.program_id(1) * plane * (2 if GATED else 1) + places
        tl.store(own, gate, mask=inside)
        if GATED:
            tl.store(own + plane, up, mask=inside)
        tl.debug_barrier()  # all threads have stored before one of them counts
        counter = arrivals + tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        last = tl.atomic_add(counter, 1, sem="acq_rel") == SPLIT - 1
        if last:
            tl.store(counter, 0)
            gate = tl.zeros_like(gate)
            up = tl.zeros_like(up)
            for part in tl.static_range(SPLIT):
                other = partial + part * plane * (2 if GATED else 1) + places
                gate += tl.load(other, mask=inside, other=0.0, cache_modifier=".cg")
                if GATED:
                    up += tl.load(other + plane, mask=inside, other=0.0, cache_modifier=".cg")
    if last:
        if bias is not None:
            gate += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)[:, None]
            if GATED:
                up += tl.load(bias + N + rows, mask=rows < N, other=0.0).to(tl.float32)[:, None]
        gate = activate(gate, ACTIVATION)
        if GATED:
            gate *= up
        if residual is not None:
            gate += tl.load(residual + places, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + places, gate.to(y.dtype.element_ty), mask=inside)
