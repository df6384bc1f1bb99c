"""Lowerings of quantization: QuantizeLinear and DequantizeLinear, symmetric, with a scale per block, channel or tensor.

In opset 17 both take float32 only. Where products of two dequantized factors are the only readers, they are taken in
float32 as well, so that nothing stands between them and TensorRT fuses them into a product of integers.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch.fx import Node

from optc.exporters.onnx.dialect import dequantize_linear
from optc.exporters.onnx.walker import Lowering, Walker

_aten, _optc = torch.ops.aten, torch.ops.optc
_DEQUANTIZED = (_optc.dequantize_activation.default, _optc.dequantize_linear.default)


def _scale(walker: Walker, node: Node, dtype: torch.dtype) -> ir.Value:
    """A scale of one number as a scalar of a type; its own value is one of that type's."""
    name = walker.program.weight_of(node)
    assert name is not None, "scales of activations are weights"
    value = walker.program.weight(name).detach().to(dtype)
    return walker.constant(value.item(), dtype) if value.numel() == 1 else walker.value(node, dtype)


def _quantize(walker: Walker, node: Node) -> ir.Value:
    x, scale = node.args[:2]
    dtype = x.meta["val"].dtype if walker.opset >= 19 else torch.float32
    zero = walker.constant(0, node.meta["val"].dtype)
    return walker.op("QuantizeLinear", [walker.value(x, dtype), _scale(walker, scale, dtype), zero])


def _dequantize_activation(walker: Walker, node: Node) -> ir.Value:
    codes, scale = node.args[:2]
    dtype = node.meta["val"].dtype
    wide = walker.opset < 19 and dtype is not torch.float32
    kind = torch.float32 if wide else dtype
    zero = walker.constant(0, codes.meta["val"].dtype)
    out = walker.op("DequantizeLinear", [walker.value(codes), _scale(walker, scale, kind), zero])
    return walker.cast(out, dtype) if wide and not _for_products(node) else out


def _requantized_weight(walker: Walker, node: Node) -> ir.Value:
    """A weight [K,N] for TensorRT before 10: in float32, [N,K], behind QuantizeLinear and DequantizeLinear.

    Its parser wants zero points, and takes no codes as weights; codes * scale rounds to the same codes again. Only this
    form is a product of integers there: channels along axis 0, and a Transpose in front of the MatMul.
    """
    names = [walker.program.weight_of(item) for item in node.args[:2]]
    assert names[0] is not None
    assert names[1] is not None, "codes and scales are weights"
    codes, scale = (walker.program.weight(name).detach() for name in names if name is not None)
    rows, channels = codes.shape
    scales = scale.float().reshape(-1)

    def wide() -> torch.Tensor:
        return (codes.float() * scales).t().contiguous()

    weight = walker.computed(f"{names[0]}.wide", wide, torch.float32, (channels, rows))
    points = walker.constant([0] * channels, torch.int8)
    per_channel = walker.constant(scales.tolist(), torch.float32)
    quantized = walker.op("QuantizeLinear", [weight, per_channel, points], {"axis": 0})
    out = walker.op("DequantizeLinear", [quantized, per_channel, points], {"axis": 0})
    return walker.op("Transpose", [out], {"perm": [1, 0]})


def _dequantize_float(walker: Walker, node: Node) -> ir.Value:
    """A weight [N,K] of fp8 codes, with one scale per row or one for all."""
    codes, scale = node.args[:2]
    if scale.meta["val"].numel() == 1:
        return walker.op("DequantizeLinear", [walker.value(codes), _scale(walker, scale, node.meta["val"].dtype)])
    per_row = walker.op("Reshape", [walker.value(scale), walker.constant([-1])])
    return walker.op("DequantizeLinear", [walker.value(codes), per_row], {"axis": 0})


def one_scale_per_row(node: Node) -> str | None:
    """A predicate for fp8 weights."""
    groups = node.args[1].meta["val"].shape[1]
    return None if groups == 1 else "fp8 weights have one scale per channel or one for all"


def _for_products(node: Node) -> bool:
    """Whether only products of two dequantized factors read a dequantized one."""
    return all(_is_integer_product(user) for user in node.users)


def _is_integer_product(node: Node) -> bool:
    return node.target is _aten.matmul.default and all(item.target in _DEQUANTIZED for item in node.args[:2])


def _matmul(walker: Walker, node: Node) -> ir.Value:
    out = walker.op("MatMul", [walker.value(item) for item in node.args[:2]])
    dtype = node.meta["val"].dtype
    wide = _is_integer_product(node) and dtype is not torch.float32
    return walker.cast(out, dtype) if wide and all(_for_products(item) for item in node.args[:2]) else out


def whole_channels(node: Node) -> str | None:
    """A predicate for the basic set: 8-bit weights with one scale per channel, whose input is rounded too."""
    if node.kwargs["bits"] != 8 or node.kwargs["block_size"]:
        return "TensorRT before 10 takes 8-bit weights with one scale per channel only"
    if not _for_products(node):
        return "TensorRT before 10 takes quantized weights in products with quantized inputs only"
    return None


TABLE: dict[Any, Lowering] = {
    _optc.quantize.default: _quantize,
    _optc.dequantize_activation.default: _dequantize_activation,
}
FUSED: dict[Any, Lowering] = {
    **TABLE,
    _optc.dequantize_linear.default: dequantize_linear,
    _optc.dequantize_float.default: _dequantize_float,
}
BASIC: dict[Any, Lowering] = {
    **TABLE,
    _optc.dequantize_linear.default: _requantized_weight,
    _aten.matmul.default: _matmul,
}
