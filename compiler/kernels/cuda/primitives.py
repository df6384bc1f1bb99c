"""What kernels share: dependent launch, activations, statistics of a norm, products of packed bytes.

NATIVE says whether code for a GPU is made; Triton's interpreter knows neither inline assembly nor dependent launch.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

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
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def let_next_start(PDL: tl.constexpr):
    """Let the next kernel start its loads before this one waits for its own producer.

    Then any number of kernels may be under way at a time, each with what it loads before its wait: nothing that a
    kernel since the beginning of the captured step wrote. The step's first and last kernels are none of these, so that
    steps do not overlap.
    """
    if PDL:
        gdc_launch_dependents()


@triton.jit
def _bring_line(places):
    """Ask for the lines of 128 bytes at these places, without waiting for them."""
    tl.inline_asm_elementwise(
        "mov.b32 $0, 0; prefetch.global.L2 [$1];", "=r,l", [places], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def bring_rows(w, rows, begin, end, ROW_BYTES: tl.constexpr, LINES: tl.constexpr):
    """Ask for LINES lines (a power of two) of each row of a weight, from the byte `begin` on, as far as `end`, to be in the
    cache that all multiprocessors share. On a GPU only."""
    byte = tl.minimum(begin + 128 * tl.arange(0, LINES), end - 1)
    _bring_line(w.to(tl.pointer_type(tl.int8)) + rows.to(tl.int64)[:, None] * ROW_BYTES + byte[None, :])


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
def load_normalized(
    x, norm_weight, norm_bias, eps, K: tl.constexpr, NORM: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """A token x [K] behind its norm, float32 [BLOCK_K] (a power of two from K on), loaded when its producer has ended."""
    columns = tl.arange(0, BLOCK_K)
    inside = columns < K
    if norm_weight is not None:
        gain = tl.load(norm_weight + columns, mask=inside, other=0.0).to(tl.float32)
    if norm_bias is not None:
        shift = tl.load(norm_bias + columns, mask=inside, other=0.0).to(tl.float32)
    let_next_start(PDL)
    wait_for_producer(PDL)
    values = tl.load(x + columns, mask=inside, other=0.0).to(tl.float32)
    if NORM == "rms":
        values *= 1.0 / tl.sqrt(tl.sum(values * values, 0) / K + eps)
    if NORM == "layer":
        mean, inverse = layer_statistics(x, eps, K, BLOCK_K)
        values = tl.where(inside, (values - mean) * inverse, 0.0)
    if norm_weight is not None:
        values *= gain
    if norm_bias is not None:
        values += shift
    return values


@triton.jit
def load_at(values, rows, N):
    """values[rows] as float32, 0 for rows from N on; of no values, 0."""
    if values is not None:
        return tl.load(values + rows, mask=rows < N, other=0.0).to(tl.float32)
    else:
        return 0.0


@triton.jit
def load_pair(values, rows, N, GATED: tl.constexpr):
    """values[rows] as `load_at`, of the gate's rows and, where there is a gate, of the up rows behind them."""
    gate = load_at(values, rows, N)
    if GATED and values is not None:
        return gate, load_at(values + N, rows, N)
    else:
        return gate, gate


@triton.jit
def store_rows(y, bias, residual, rows, N, gate, up, ACTIVATION: tl.constexpr, GATED: tl.constexpr):
    """y[rows] = activation(gate + bias) [* (up + bias)] + residual, for rows below N.

    Bias (a pair, as `load_pair` has it) and residual are values: loaded here, a program would end later by the time that
    memory takes to answer.
    """
    gate = activate(gate + bias[0], ACTIVATION)
    if GATED:
        gate *= up + bias[1]
    tl.store(y + rows, (gate + residual).to(y.dtype.element_ty), mask=rows < N)


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


@triton.constexpr_function
def _load_words_asm(once, offset):
    policy = ".L1::evict_first" if once else ""
    return f"ld.global{policy}.v4.b32 {{$0, $1, $2, $3}}, [$4 + {int(offset)}];"


@triton.jit
def load_words(places, OFFSET: tl.constexpr, ONCE: tl.constexpr):
    """Four words of 32 bits, OFFSET bytes behind `places` (aligned to 16 bytes), as int32; ONCE: none is read again.

    Through assembly: a thread loads what it works with, where tl.load of neighbours would spread them over threads and
    bring them back through shared memory.
    """
    return tl.inline_asm_elementwise(
        _load_words_asm(ONCE, OFFSET), "=r,=r,=r,=r,l", [places],
        dtype=(tl.int32, tl.int32, tl.int32, tl.int32), is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _halves(word, kind: tl.constexpr):
    """The two floats of 16 bits that a word holds, as float32."""
    if kind == tl.bfloat16:
        return (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(tl.float32, bitcast=True)
    else:
        low = word.to(tl.int16).to(kind, bitcast=True).to(tl.float32)
        return low, (word >> 16).to(tl.int16).to(kind, bitcast=True).to(tl.float32)


@triton.jit
def load_run(pointer, runs, COLUMNS: tl.constexpr, NATIVE: tl.constexpr):
    """The COLUMNS elements of each run, as `run_values` takes them: words of a thread's own."""
    kind: tl.constexpr = pointer.dtype.element_ty
    places = pointer + runs * COLUMNS
    values = ()
    if NATIVE:
        for i in tl.static_range(COLUMNS * kind.primitive_bitwidth // 128):
            values = values + load_words(places, 16 * i, False)
    else:
        for i in tl.static_range(COLUMNS):
            values = values + (tl.load(places + i),)
    return values


@triton.jit
def run_values(loaded, kind: tl.constexpr, COLUMNS: tl.constexpr, NATIVE: tl.constexpr):
    """What `load_run` loaded of elements of `kind`, as COLUMNS float32 tensors."""
    values = ()
    if NATIVE:
        for i in tl.static_range(COLUMNS * kind.primitive_bitwidth // 32):
            if kind == tl.float32:
                values = values + (loaded[i].to(tl.float32, bitcast=True),)
            else:
                values = values + _halves(loaded[i], kind)
    else:
        for i in tl.static_range(COLUMNS):
            values = values + (loaded[i].to(tl.float32),)
    return values


@triton.jit
def quad_magnitude(quad):
    return nan_maximum(nan_maximum(tl.abs(quad[0]), tl.abs(quad[1])), nan_maximum(tl.abs(quad[2]), tl.abs(quad[3])))


@triton.jit
def quad_square(quad):
    return (quad[0] * quad[0] + quad[1] * quad[1]) + (quad[2] * quad[2] + quad[3] * quad[3])


@triton.jit
def quad_digits(quad, inverse, NATIVE: tl.constexpr):
    """Words of four signed bytes each, low and high digits: round(v * inverse) = 256 * high + low."""
    w0 = (quad[0] * inverse + ROUNDER).to(tl.int32, bitcast=True)
    w1 = (quad[1] * inverse + ROUNDER).to(tl.int32, bitcast=True)
    w2 = (quad[2] * inverse + ROUNDER).to(tl.int32, bitcast=True)
    w3 = (quad[3] * inverse + ROUNDER).to(tl.int32, bitcast=True)
    first = permute_bytes(w0, w1, 0x5140, NATIVE)
    second = permute_bytes(w2, w3, 0x5140, NATIVE)
    low = permute_bytes(first, second, 0x5410, NATIVE) ^ -2139062144  # 0x80808080 takes the 128 off again
    return low, permute_bytes(first, second, 0x7632, NATIVE)


@triton.jit
def store_block(
    y, bias, residual, partial, arrivals, rows, tokens, unit, M, N, gate, up, ACTIVATION: tl.constexpr,
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
        finish_block(
            y, bias, residual, rows[:, None], tokens[None, :], unit, M, N, gate, up, ACTIVATION, GATED
        )  # fmt: skip


@triton.jit
def finish_block(
    y, bias, residual, rows, tokens, unit, M, N, gate, up, ACTIVATION: tl.constexpr, GATED: tl.constexpr
):  # fmt: skip
    """y[tokens, rows] = activation(gate * unit + bias) [* (up * unit + bias)] + residual, for rows and tokens that go together
    when they are broadcast."""
    inside = (rows < N) & (tokens < M)
    places = tokens.to(tl.int64) * N + rows
    if unit is not None:
        units = tl.load(unit + tokens, mask=tokens < M, other=0.0)
        gate *= units
        up *= units
    if bias is not None:
        gate += tl.load(bias + rows, mask=rows < N, other=0.0).to(tl.float32)
        if GATED:
            up += tl.load(bias + N + rows, mask=rows < N, other=0.0).to(tl.float32)
    gate = activate(gate, ACTIVATION)
    if GATED:
        gate *= up
    if residual is not None:
        gate += tl.load(residual + places, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + places, gate.to(y.dtype.element_ty), mask=inside)
