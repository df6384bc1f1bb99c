"""Lowerings of the `optc::` dialect."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch.fx import Node

from optc.compiler.ir.lazy_weights import materialized
from optc.compiler.ops.dialect.quantization import SMALLEST_SCALE
from optc.compiler.ops.packed.onnxruntime_products import MIDDLE
from optc.exporters.onnx.walker import MICROSOFT, Lowering, Walker

_optc = torch.ops.optc


def _rotary(walker: Walker, node: Node) -> ir.Value:
    """RotaryEmbedding-23 on cos and sin of the positions at hand."""
    x, position, frequencies = node.args[:3]
    dtype, size = node.meta["val"].dtype, int(node.meta["val"].shape[3])
    places = walker.op("Unsqueeze", [walker.value(position, torch.float32), walker.constant([-1])])
    angle = walker.op("Mul", [places, walker.value(frequencies, torch.float32)])
    scale = walker.constant(float(node.kwargs["scaling"]), torch.float32)
    tables = [walker.op("Mul", [walker.op(kind, [angle]), scale]) for kind in ("Cos", "Sin")]
    tables = [table if dtype is torch.float32 else walker.cast(table, dtype) for table in tables]
    half = int(frequencies.meta["val"].shape[0])
    attributes: dict[str, Any] = {"interleaved": int(bool(node.kwargs["interleaved"]))}
    if 2 * half != size:
        attributes["rotary_embedding_dim"] = 2 * half
    return walker.op("RotaryEmbedding", [walker.value(x), *tables], attributes)


def _rotate_blocks(walker: Walker, node: Node) -> ir.Value:
    """A product of the channels as [..., K/n, n] with the matrix [n, n]."""
    x, matrix = node.args
    size, rank = int(matrix.meta["val"].shape[0]), node.meta["val"].dim()
    columns = int(node.meta["val"].shape[-1])
    apart = walker.constant([0] * (rank - 1) + [columns // size, size])
    product = walker.op("MatMul", [walker.op("Reshape", [walker.value(x), apart]), walker.value(matrix)])
    return walker.op("Reshape", [product, walker.constant([0] * (rank - 1) + [columns])])


def _group_query_attention(walker: Walker, node: Node) -> tuple[ir.Value, ...]:
    """Float caches, or int8 ones where two scales follow."""
    query, key, value, past_key, past_value, seqlens, total, cos, sin, *scales = node.args
    streams = [None if x is None else walker.value(x) for x in (query, key, value)]
    tables = [None if x is None else walker.value(x) for x in (cos, sin)]
    knobs = dict(node.kwargs)
    attributes = {
        "num_heads": knobs["num_heads"],
        "kv_num_heads": knobs["kv_num_heads"],
        "scale": float(knobs["scale"]),
        "softcap": float(knobs["softcap"]),
        "local_window_size": knobs["local_window_size"],
        "do_rotary": int(cos is not None),
        "rotary_interleaved": int(bool(knobs["rotary_interleaved"])),
    }
    inputs = [
        *streams,
        walker.value(past_key),
        walker.value(past_value),
        walker.value(seqlens),
        walker.cast(walker.size(total), torch.int32),  # a vector of one element is taken, and needs no Squeeze
        *tables,
    ]
    if scales:
        inputs += [None, None, None, *(walker.value(item) for item in scales)]  # positions, bias, sinks
        kinds = ["PER_TENSOR" if item.meta["val"].numel() == 1 else "PER_CHANNEL" for item in scales]
        attributes |= {"kv_cache_bit_width": 8, "k_quant_type": kinds[0], "v_quant_type": kinds[1]}
    return walker.op("GroupQueryAttention", inputs, attributes, domain=MICROSOFT, outputs=3)


def _matmul_nbits(walker: Walker, node: Node) -> ir.Value:
    x, packed, scales, zeros, bias = node.args
    slots = (zeros, None, bias)  # between zeros and bias: the deprecated g_idx
    tensors = [None if item is None else walker.value(item) for item in slots]
    tensors = [walker.value(x), walker.value(packed), walker.compact(scales), *tensors]
    return walker.op("MatMulNBits", tensors, dict(node.kwargs), domain=MICROSOFT)


def _gather_nbits(walker: Walker, node: Node) -> ir.Value:
    """Lookup in the very initializer that MatMulNBits takes: its bytes, row by row, are those of [N, K]."""
    indices, packed, scales, zeros = node.args
    K, bits, block = (node.kwargs[key] for key in ("K", "bits", "block_size"))
    # Folded when the model is loaded.
    table = walker.op("Reshape", [walker.value(packed), walker.constant([-1, K * bits // 8])])
    points = None if zeros is None else walker.value(zeros)
    inputs = [table, walker.value(indices), walker.compact(scales), points]
    attributes = {"gather_axis": 0, "quantize_axis": 1, "bits": bits, "block_size": block}
    return walker.op("GatherBlockQuantized", inputs, attributes, domain=MICROSOFT)


def _quantize_tokens(walker: Walker, node: Node) -> tuple[ir.Value, ir.Value]:
    """Scales of the tokens; codes by QuantizeLinear of the ratio, with 128 for zero."""
    x = walker.value(node.args[0])
    largest = walker.op("ReduceMax", [walker.op("Abs", [x]), walker.constant([-1])], {"keepdims": 1})
    ratio = walker.op("Div", [largest, walker.constant(127.0, torch.float32)])
    scale = walker.op("Max", [ratio, walker.constant(SMALLEST_SCALE, torch.float32)])
    zero = walker.constant(MIDDLE, torch.uint8)
    unit = walker.constant(1.0, torch.float32)
    return walker.op("QuantizeLinear", [walker.op("Div", [x, scale]), unit, zero]), scale


def _matmul_integer(walker: Walker, node: Node) -> ir.Value:
    codes, weight, scale, weight_scale, bias = node.args
    middle = walker.constant(MIDDLE, torch.uint8)
    unsigned = weight.meta["val"].dtype is torch.uint8
    inputs = [
        walker.value(codes),
        walker.value(weight),
        walker.constant(1.0, torch.float32),
        walker.value(weight_scale),
        middle,
        middle if unsigned else None,
    ]
    sums = walker.op("MatMulIntegerToFloat", inputs, domain=MICROSOFT)
    out = walker.op("Mul", [sums, walker.value(scale)])
    return out if bias is None else walker.op("Add", [out, walker.value(bias)])


def dequantize_linear(walker: Walker, node: Node) -> ir.Value:
    """DequantizeLinear of a weight [K,N]: blocks along axis 0, or one scale per column."""
    codes, scale, zero = node.args
    K, N, bits, signed, block = (node.kwargs[key] for key in ("K", "N", "bits", "signed", "block_size"))

    def stored(item: Node, rows: int) -> ir.Value:
        if bits == 8:
            return walker.value(item)
        kind = ir.DataType.INT4 if signed else ir.DataType.UINT4
        return walker.packed(item, kind, [rows, N] if block or item is codes else [N])

    blocks = K // block if block else 1
    points = None if zero is None else stored(zero, blocks)
    if points is not None and not block and bits == 8:
        points = walker.op("Reshape", [points, walker.constant([-1])])
    attributes = {"axis": 0, "block_size": block} if block else {"axis": 1}
    return walker.op("DequantizeLinear", [stored(codes, K), walker.value(scale), points], attributes)


def _grid(walker: Walker, node: Node) -> list[ir.Value]:
    """Scale and zero point of a tensor."""
    scale, zero = float(node.kwargs["scale"]), int(node.kwargs["zero"])
    return [walker.constant(scale, torch.float32), walker.constant(zero, torch.uint8)]


def _quantize_tensor(walker: Walker, node: Node) -> ir.Value:
    return walker.op("QuantizeLinear", [walker.value(node.args[0], torch.float32), *_grid(walker, node)])


def _dequantize_tensor(walker: Walker, node: Node) -> ir.Value:
    out = walker.op("DequantizeLinear", [walker.value(node.args[0]), *_grid(walker, node)])
    dtype = node.meta["val"].dtype
    return out if dtype is torch.float32 else walker.cast(out, dtype)


def _dequantize_channels(walker: Walker, node: Node) -> ir.Value:
    """DequantizeLinear along an axis, with zero points, without which ONNX Runtime leaves a Gemm in floating point."""
    codes, scale = node.args
    zeros = walker.constant([0] * int(scale.meta["val"].shape[0]), torch.int8)
    return walker.op(
        "DequantizeLinear", [walker.value(codes), walker.value(scale), zeros], {"axis": node.kwargs["axis"]}
    )


def _dequantize_bias(walker: Walker, node: Node) -> ir.Value:
    """DequantizeLinear of int32 in steps of a product: scale of the weight times that of the input."""
    codes, scale = node.args
    names = [walker.program.weight_of(item) for item in (codes, scale)]
    assert names[0] is not None
    assert names[1] is not None, "codes and scales are weights"
    step, held = float(node.kwargs["input_scale"]), walker.program.weight(names[1]).detach()
    steps = walker.computed(
        f"{names[0]}.scale",
        lambda: materialized(held).float().reshape(-1) * step,
        torch.float32,
        codes.meta["val"].shape,
    )
    return walker.op("DequantizeLinear", [walker.value(codes), steps], {"axis": 0})


def _matmul_bnb4(walker: Walker, node: Node) -> ir.Value:
    inputs = [*(walker.value(item) for item in node.args[:2]), walker.compact(node.args[2])]
    attributes = {**node.kwargs, "quant_type": 1}  # NF4
    return walker.op("MatMulBnb4", inputs, attributes, domain=MICROSOFT)


def _skip_rms_norm(walker: Walker, node: Node) -> tuple[ir.Value, ir.Value]:
    inputs = [walker.value(item) for item in node.args]
    attributes = {"epsilon": float(node.kwargs["eps"])}
    made = walker.op("SkipSimplifiedLayerNormalization", inputs, attributes, domain=MICROSOFT, outputs=4)
    for unused in made[1:3]:
        unused.name = ""
    return made[0], made[3]


def _linear_attention(walker: Walker, node: Node) -> Any:
    """LinearAttention, whose streams are [B, S, heads * width]."""
    query, key, value, decay, beta, *states = node.args
    heads, rule = int(value.meta["val"].shape[2]), "gated" if beta is None else "gated_delta"

    def packed(item: Node) -> ir.Value:
        stream = walker.value(item, torch.float32)
        return walker.op("Reshape", [stream, walker.constant([0, 0, -1])]) if item.meta["val"].dim() == 4 else stream

    inputs = [*map(packed, (query, key, value)), *(map(walker.value, states) if states else [None]), packed(decay)]
    inputs += [] if beta is None else [walker.value(beta, torch.float32)]
    attributes = {"q_num_heads": heads, "kv_num_heads": heads, "update_rule": rule, "scale": 1.0}
    out, state = walker.op("LinearAttention", inputs, attributes, domain=MICROSOFT, outputs=2)
    width = int(value.meta["val"].shape[3])
    apart = walker.op("Reshape", [out, walker.constant([0, 0, heads, width])])
    return (apart, state) if states else apart


def _causal_conv1d(walker: Walker, node: Node) -> ir.Value:
    """Conv of each channel, padded on the left."""
    x, weight, bias = node.args
    channels, width = (int(size) for size in weight.meta["val"].shape)
    kernel = walker.op("Unsqueeze", [walker.value(weight), walker.constant([1])])
    inputs = [walker.value(x), kernel, None if bias is None else walker.value(bias)]
    return walker.op("Conv", inputs, {"group": channels, "kernel_shape": [width], "pads": [width - 1, 0]})


TABLE: dict[Any, Lowering] = {
    _optc.causal_conv1d.default: _causal_conv1d,
    _optc.linear_attention.default: _linear_attention,
    _optc.cached_linear_attention.default: _linear_attention,
    _optc.rotary.default: _rotary,
    _optc.rotate_blocks.default: _rotate_blocks,
    _optc.group_query_attention.default: _group_query_attention,
    _optc.group_query_attention_codes.default: _group_query_attention,
    _optc.matmul_nbits.default: _matmul_nbits,
    _optc.gather_nbits.default: _gather_nbits,
    _optc.skip_rms_norm.default: _skip_rms_norm,
    _optc.quantize_tokens.default: _quantize_tokens,
    _optc.matmul_integer.default: _matmul_integer,
    _optc.matmul_bnb4.default: _matmul_bnb4,
    _optc.dequantize_linear.default: dequantize_linear,
    _optc.quantize_tensor.default: _quantize_tensor,
    _optc.dequantize_tensor.default: _dequantize_tensor,
    _optc.dequantize_channels.default: _dequantize_channels,
    _optc.dequantize_bias.default: _dequantize_bias,
}
