"""Lowerings of functions of one tensor, casts, selection and copies."""

from __future__ import annotations

import math
from typing import Any

import onnx_ir as ir
import torch
from torch.fx import Node

from optc.compiler.ir.asserts import ASSERTS
from optc.exporters.onnx.walker import Lowering, Walker, argument, is_symbolic, result_dtype

_aten = torch.ops.aten


def _unary(kind: str, **attributes: Any) -> Lowering:
    def lower(walker: Walker, node: Node) -> ir.Value:
        return walker.op(kind, [walker.value(node.args[0], result_dtype(node))], attributes)

    return lower


def _rounding(kind: str) -> Lowering:
    """floor, ceil, round: integers stay as they are."""

    def lower(walker: Walker, node: Node) -> ir.Value:
        x = walker.value(node.args[0])
        return walker.op(kind, [x]) if result_dtype(node).is_floating_point else x

    return lower


def _is_nan(walker: Walker, node: Node) -> ir.Value:
    source = node.args[0].meta["val"].dtype
    return walker.op("IsNaN", [walker.value(node.args[0], source if source.is_floating_point else torch.float32)])


def _is_infinite(walker: Walker, node: Node) -> ir.Value:
    source = node.args[0].meta["val"].dtype
    return walker.op("IsInf", [walker.value(node.args[0], source if source.is_floating_point else torch.float32)])


def _truncated(walker: Walker, node: Node) -> ir.Value:
    dtype, x = result_dtype(node), walker.value(node.args[0])
    if not dtype.is_floating_point:
        return x
    negative = walker.op("Less", [x, walker.constant(0, dtype)])
    return walker.op("Where", [negative, walker.op("Ceil", [x]), walker.op("Floor", [x])])


def _shifted(before: int, kind: str, after: int) -> Lowering:
    """log1p, expm1."""

    def lower(walker: Walker, node: Node) -> ir.Value:
        dtype = result_dtype(node)
        x = walker.value(node.args[0], dtype)
        x = walker.op("Add", [x, walker.constant(before, dtype)]) if before else x
        out = walker.op(kind, [x])
        return walker.op("Sub", [out, walker.constant(after, dtype)]) if after else out

    return lower


def _relu(walker: Walker, node: Node) -> ir.Value:
    dtype, x = result_dtype(node), walker.value(node.args[0])
    # ONNX Runtime has no Relu of int64
    return walker.op("Relu", [x]) if dtype.is_floating_point else walker.op("Max", [x, walker.constant(0, dtype)])


def _rsqrt(walker: Walker, node: Node) -> ir.Value:
    return walker.op("Reciprocal", [walker.op("Sqrt", [walker.value(node.args[0], result_dtype(node))])])


def _square(walker: Walker, node: Node) -> ir.Value:
    x = walker.value(node.args[0])
    return walker.op("Mul", [x, x])


def _log_base(base: float) -> Lowering:
    def lower(walker: Walker, node: Node) -> ir.Value:
        dtype = result_dtype(node)
        out = walker.op("Log", [walker.value(node.args[0], dtype)])
        return walker.op("Mul", [out, walker.constant(1.0 / math.log(base), dtype)])

    return lower


# -- activations ------------------------------------------------------------------------------


def _silu(walker: Walker, node: Node) -> ir.Value:
    x = walker.value(node.args[0])
    return walker.op("Mul", [x, walker.op("Sigmoid", [x])])


def _gelu(walker: Walker, node: Node) -> ir.Value:
    approximate = node.kwargs.get("approximate", "none")
    return walker.op("Gelu", [walker.value(node.args[0])], {"approximate": approximate})


def _leaky_relu(walker: Walker, node: Node) -> ir.Value:
    slope = argument(node, 1, "negative_slope", 0.01)
    return walker.op("LeakyRelu", [walker.value(node.args[0])], {"alpha": float(slope)})


def _elu(walker: Walker, node: Node) -> ir.Value:
    """scale * x where positive, scale * alpha * (exp(input_scale * x) - 1) elsewhere."""
    dtype, x = result_dtype(node), walker.value(node.args[0])
    alpha, scale, input_scale = (
        float(argument(node, i, name, 1)) for i, name in ((1, "alpha"), (2, "scale"), (3, "input_scale"))
    )
    if scale == input_scale == 1.0:
        return walker.op("Elu", [x], {"alpha": alpha})
    inner = walker.op("Elu", [walker.op("Mul", [x, walker.constant(input_scale, dtype)])])
    low = walker.op("Mul", [inner, walker.constant(scale * alpha, dtype)])
    positive = walker.op("Greater", [x, walker.constant(0, dtype)])
    return walker.op("Where", [positive, walker.op("Mul", [x, walker.constant(scale, dtype)]), low])


def _softplus(walker: Walker, node: Node) -> ir.Value:
    """log(1 + exp(beta * x)) / beta, and x itself where beta * x is above the threshold."""
    dtype, x = result_dtype(node), walker.value(node.args[0])
    beta, threshold = (
        float(argument(node, i, name, default)) for i, name, default in ((1, "beta", 1), (2, "threshold", 20))
    )
    scaled = x if beta == 1 else walker.op("Mul", [x, walker.constant(beta, dtype)])
    soft = walker.op("Softplus", [scaled])
    soft = soft if beta == 1 else walker.op("Div", [soft, walker.constant(beta, dtype)])
    return walker.op("Where", [walker.op("Greater", [scaled, walker.constant(threshold, dtype)]), x, soft])


def _hard_sigmoid(walker: Walker, node: Node) -> ir.Value:
    return walker.op("HardSigmoid", [walker.value(node.args[0])], {"alpha": 1 / 6, "beta": 0.5})


# -- clamping and selection -------------------------------------------------------------------


def _between(walker: Walker, node: Node, low: Any, high: Any) -> ir.Value:
    dtype = result_dtype(node)
    out = walker.value(node.args[0], dtype)
    vector = dtype is torch.int64 and node.meta["val"].dim() > 0  # a size [1] does as it is

    def bound(item: Any) -> ir.Value:
        return walker.size(item) if vector and is_symbolic(item) else walker.value(item, dtype)

    if low is not None:
        out = walker.op("Max", [out, bound(low)])
    return out if high is None else walker.op("Min", [out, bound(high)])


def _clamp(walker: Walker, node: Node) -> ir.Value:
    if node.target is _aten.clamp_max.default:
        return _between(walker, node, None, node.args[1])
    return _between(walker, node, argument(node, 1, "min"), argument(node, 2, "max"))


def _clip(walker: Walker, node: Node, low: Any, high: Any) -> ir.Value:
    """Clip, which engines and quantizers take into the convolution in front of it."""
    dtype = result_dtype(node)
    if not dtype.is_floating_point:
        return _between(walker, node, low, high)
    return walker.op(
        "Clip", [walker.value(node.args[0], dtype), walker.constant(low, dtype), walker.constant(high, dtype)]
    )


def _relu6(walker: Walker, node: Node) -> ir.Value:
    return _clip(walker, node, 0, 6)


def _hard_tanh(walker: Walker, node: Node) -> ir.Value:
    return _clip(walker, node, argument(node, 1, "min_val", -1), argument(node, 2, "max_val", 1))


def select(walker: Walker, dtype: torch.dtype, condition: ir.Value, yes: ir.Value, no: ir.Value) -> ir.Value:
    """Where; ONNX Runtime has no kernel for bools, so these are selected by logic."""
    if dtype is not torch.bool:
        return walker.op("Where", [condition, yes, no])
    chosen = walker.op("And", [condition, yes])
    return walker.op("Or", [chosen, walker.op("And", [walker.op("Not", [condition]), no])])


def _where(walker: Walker, node: Node) -> ir.Value:
    dtype = result_dtype(node)
    condition = walker.value(node.args[0], torch.bool)
    return select(walker, dtype, condition, walker.value(node.args[1], dtype), walker.value(node.args[2], dtype))


def _masked_fill(walker: Walker, node: Node) -> ir.Value:
    (x, mask, value), dtype = node.args[:3], result_dtype(node)
    return select(walker, dtype, walker.value(mask, torch.bool), walker.value(value, dtype), walker.value(x, dtype))


# -- casts and copies -------------------------------------------------------------------------


def _to(walker: Walker, node: Node) -> ir.Value:
    return walker.value(node.args[0], result_dtype(node))


def _same(walker: Walker, node: Node) -> ir.Value:
    return walker.value(node.args[0])


def _nothing(walker: Walker, node: Node) -> None:
    """Metadata asserts repeat what the graph's types say."""


def _table() -> dict[Any, Lowering]:
    table: dict[Any, Lowering] = {}

    def add(lower: Lowering, *targets: Any) -> None:
        table.update(dict.fromkeys(targets, lower))

    for kind in (
        "Neg",
        "Abs",
        "Exp",
        "Log",
        "Sqrt",
        "Sin",
        "Cos",
        "Tan",
        "Asin",
        "Acos",
        "Atan",
        "Sinh",
        "Cosh",
        "Asinh",
        "Acosh",
        "Atanh",
        "Tanh",
        "Erf",
        "Sigmoid",
        "Sign",
        "Reciprocal",
        "Mish",
        "HardSwish",
        "Selu",
    ):
        add(_unary(kind), getattr(_aten, kind.lower()).default)
    for kind in ("Floor", "Ceil", "Round"):
        add(_rounding(kind), getattr(_aten, kind.lower()).default)
    add(_is_nan, _aten.isnan.default)
    add(_is_infinite, _aten.isinf.default)
    add(_truncated, _aten.trunc.default)
    add(_shifted(1, "Log", 0), _aten.log1p.default)
    add(_shifted(0, "Exp", 1), _aten.expm1.default)
    add(_relu, _aten.relu.default, _aten.relu_.default)
    add(_rsqrt, _aten.rsqrt.default)
    add(_square, _aten.square.default)
    add(_log_base(2.0), _aten.log2.default)
    add(_log_base(10.0), _aten.log10.default)
    add(_silu, _aten.silu.default, _aten.silu_.default)
    add(_gelu, _aten.gelu.default)
    add(_leaky_relu, _aten.leaky_relu.default)
    add(_elu, _aten.elu.default)
    add(_softplus, _aten.softplus.default)
    add(_hard_sigmoid, _aten.hardsigmoid.default)
    add(_relu6, _aten.relu6.default)
    add(_hard_tanh, _aten.hardtanh.default, _aten.hardtanh_.default)
    add(_clamp, _aten.clamp.default, _aten.clamp.Tensor, _aten.clamp_min.default, _aten.clamp_max.default)
    add(_where, _aten.where.self, _aten.where.ScalarOther, _aten.where.ScalarSelf, _aten.where.Scalar)
    add(_masked_fill, _aten.masked_fill.Scalar, _aten.masked_fill.Tensor, _aten.masked_fill_.Scalar)
    add(
        _to,
        _aten.to.dtype,
        _aten.to.dtype_layout,
        _aten.to.device,
        _aten.to.other,
        _aten._to_copy.default,
        _aten.type_as.default,
    )
    add(
        _same,
        _aten.contiguous.default,
        _aten.clone.default,
        _aten.alias.default,
        _aten.detach.default,
        _aten.detach_.default,
        _aten.lift_fresh_copy.default,
        _aten.dropout.default,
    )
    add(_nothing, *ASSERTS)
    return table


TABLE = _table()
