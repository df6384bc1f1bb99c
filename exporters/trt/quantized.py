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


def _dequantize_weight(walker: Walker, node: Node) -> ir.Value:
    """As the dialect's; in opset 17 with scales of float32."""
    dtype = node.meta["val"].dtype
    if walker.opset >= 19 or dtype is torch.float32:
        return dequantize_linear(walker, node)
    codes, scale = node.args[:2]
    inputs = [walker.value(codes), walker.value(scale, torch.float32)]
    out = walker.op("DequantizeLinear", inputs, {"axis": 1})
    return out if _for_products(node) else walker.cast(out, dtype)


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
    _optc.dequantize_linear.default: _dequantize_weight,
}
FUSED: dict[Any, Lowering] = {**TABLE, _optc.dequantize_float.default: _dequantize_float}
BASIC: dict[Any, Lowering] = {**TABLE, _aten.matmul.default: _matmul}
