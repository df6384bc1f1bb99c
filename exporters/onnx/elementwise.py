"""Lowerings of elementwise operators, casts and comparisons, with ATen's type promotion."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from torch.fx import Node

from optc.exporters.onnx.walker import DTYPES, Lowering, Walker, argument, is_symbolic

_aten = torch.ops.aten


def _out(node: Node) -> torch.dtype:
    val = node.meta["val"]
    return val.dtype if isinstance(val, torch.Tensor) else torch.int64


def promoted(node: Node) -> torch.dtype:
    """The type in which the operands of a comparison meet."""
    operands = []
    for item in node.args[:2]:
        val = item.meta["val"] if isinstance(item, Node) else item
        operands.append(val if isinstance(val, torch.Tensor | int | float | bool) else 0)
    return torch.result_type(operands[0], operands[1]) if len(operands) > 1 else torch.result_type(operands[0], 0)


def _unary(kind: str, **attributes: Any) -> Lowering:
    def lower(walker: Walker, node: Node) -> ir.Value:
        return walker.op(kind, [walker.value(node.args[0], _out(node))], attributes)

    return lower


def _binary(kind: str) -> Lowering:
    def lower(walker: Walker, node: Node) -> ir.Value:
        dtype = _out(node)
        left, right = (walker.value(item, dtype) for item in node.args[:2])
        alpha = node.kwargs.get("alpha", 1)
        if alpha != 1:
            right = walker.op("Mul", [right, walker.constant(alpha, dtype)])
        out = walker.op(kind, [left, right])
        return scalar_shaped(walker, node, out)

    return lower


def scalar_shaped(walker: Walker, node: Node, value: ir.Value) -> ir.Value:
    """A rank-0 result that took the [1] shape of a size operand, as rank 0."""
    val = node.meta["val"]
    if isinstance(val, torch.Tensor) and val.dim() == 0 and any(is_symbolic(item) for item in node.args):
        return walker.op("Reshape", [value, walker.constant([], torch.int64)])
    return value


def _comparison(kind: str, negated: bool = False) -> Lowering:
    def lower(walker: Walker, node: Node) -> ir.Value:
        dtype = promoted(node)
        out = walker.op(kind, [walker.value(item, dtype) for item in node.args[:2]])
        return walker.op("Not", [out]) if negated else out

    return lower


def _logical(kind: str) -> Lowering:
    """and, or, xor, not: on bools the logical operator, on integers the bitwise one."""

    def lower(walker: Walker, node: Node) -> ir.Value:
        dtype = _out(node)
        name = kind if dtype is torch.bool else f"Bitwise{kind}"
        operands = [walker.value(item, dtype) for item in node.args[:2]]
        return walker.op(name, operands)

    return lower


def _to(walker: Walker, node: Node) -> ir.Value:
    return walker.value(node.args[0], _out(node))


def _where(walker: Walker, node: Node) -> ir.Value:
    dtype = _out(node)
    condition = walker.value(node.args[0], torch.bool)
    return walker.op("Where", [condition, walker.value(node.args[1], dtype), walker.value(node.args[2], dtype)])


def _masked_fill(walker: Walker, node: Node) -> ir.Value:
    x, mask, value = node.args[:3]
    dtype = _out(node)
    return walker.op("Where", [walker.value(mask, torch.bool), walker.value(value, dtype), walker.value(x, dtype)])


def _divide(walker: Walker, node: Node) -> ir.Value:
    dtype, mode = _out(node), node.kwargs.get("rounding_mode")
    work = torch.float32 if mode and not dtype.is_floating_point else dtype
    out = walker.op("Div", [walker.value(item, work) for item in node.args[:2]])
    if mode == "floor":
        out = walker.op("Floor", [out])
    elif mode == "trunc":
        out = walker.op("Where", [walker.op("Less", [out, walker.constant(0, work)]),
                                  walker.op("Ceil", [out]), walker.op("Floor", [out])])  # fmt: skip
    return out if work is dtype else walker.cast(out, dtype)


def _clamp(walker: Walker, node: Node) -> ir.Value:
    dtype = _out(node)
    low, high = argument(node, 1, "min"), argument(node, 2, "max")
    out = walker.value(node.args[0], dtype)
    if low is not None:
        out = walker.op("Max", [out, walker.value(low, dtype)])
    if high is not None:
        out = walker.op("Min", [out, walker.value(high, dtype)])
    return out


def _pow(walker: Walker, node: Node) -> ir.Value:
    dtype, (base, exponent) = _out(node), node.args[:2]
    if exponent == 2:
        x = walker.value(base, dtype)
        return walker.op("Mul", [x, x])
    return walker.op("Pow", [walker.value(base, dtype), walker.value(exponent, dtype)])


def _rsqrt(walker: Walker, node: Node) -> ir.Value:
    return walker.op("Reciprocal", [walker.op("Sqrt", [walker.value(node.args[0], _out(node))])])


def _silu(walker: Walker, node: Node) -> ir.Value:
    x = walker.value(node.args[0])
    return walker.op("Mul", [x, walker.op("Sigmoid", [x])])


def _gelu(walker: Walker, node: Node) -> ir.Value:
    approximate = node.kwargs.get("approximate", "none")
    return walker.op("Gelu", [walker.value(node.args[0])], {"approximate": approximate})


def _leaky_relu(walker: Walker, node: Node) -> ir.Value:
    slope = argument(node, 1, "negative_slope", 0.01)
    return walker.op("LeakyRelu", [walker.value(node.args[0])], {"alpha": float(slope)})


def _log_base(base: float) -> Lowering:
    def lower(walker: Walker, node: Node) -> ir.Value:
        dtype = _out(node)
        out = walker.op("Log", [walker.value(node.args[0], dtype)])
        return walker.op("Mul", [out, walker.constant(1.0 / math.log(base), dtype)])

    return lower


def _same(walker: Walker, node: Node) -> ir.Value:
    return walker.value(node.args[0])


def _size_arithmetic(kind: str) -> Lowering:
    def lower(walker: Walker, node: Node) -> ir.Value:
        return walker.op(kind, [walker.size(item) for item in node.args])

    return lower


def _fmod(walker: Walker, node: Node) -> ir.Value:
    dtype = _out(node)
    attributes = {"fmod": 1} if node.target in (_aten.fmod.Scalar, _aten.fmod.Tensor) else {}
    left, right = (walker.value(item, dtype) for item in node.args[:2])
    if dtype.is_floating_point and not attributes:  # remainder: a - floor(a / b) * b
        floor = walker.op("Floor", [walker.op("Div", [left, right])])
        return walker.op("Sub", [left, walker.op("Mul", [floor, right])])
    return walker.op("Mod", [left, right], attributes)


def _table() -> dict[Any, Lowering]:
    table: dict[Any, Lowering] = {}

    def add(lower: Lowering, *targets: Callable[..., Any]) -> None:
        table.update(dict.fromkeys(targets, lower))

    for name, kind in (("neg", "Neg"), ("abs", "Abs"), ("exp", "Exp"), ("log", "Log"), ("sqrt", "Sqrt"),
                       ("sin", "Sin"), ("cos", "Cos"), ("tan", "Tan"), ("tanh", "Tanh"), ("erf", "Erf"), ("sigmoid", "Sigmoid"),
                       ("relu", "Relu"), ("floor", "Floor"), ("ceil", "Ceil"), ("round", "Round"), ("sign", "Sign"),
                       ("reciprocal", "Reciprocal"), ("softplus", "Softplus"), ("mish", "Mish"),
                       ("hardswish", "HardSwish"), ("selu", "Selu"), ("isnan", "IsNaN")):  # fmt: skip
        add(_unary(kind), getattr(_aten, name).default)
    add(_unary("Elu"), _aten.elu.default)
    add(_rsqrt, _aten.rsqrt.default)
    add(_silu, _aten.silu.default, _aten.silu_.default)
    add(_unary("Relu"), _aten.relu_.default)
    add(_gelu, _aten.gelu.default)
    add(_leaky_relu, _aten.leaky_relu.default)
    add(_log_base(2.0), _aten.log2.default)
    add(_log_base(10.0), _aten.log10.default)
    add(_binary("Add"), _aten.add.Tensor, _aten.add.Scalar, _aten.add_.Tensor)
    add(_binary("Sub"), _aten.sub.Tensor, _aten.sub.Scalar, _aten.sub_.Tensor)
    add(_binary("Mul"), _aten.mul.Tensor, _aten.mul.Scalar, _aten.mul_.Tensor)
    add(_binary("Max"), _aten.maximum.default)
    add(_binary("Min"), _aten.minimum.default)
    add(_divide, _aten.div.Tensor, _aten.div.Scalar, _aten.div_.Tensor, _aten.div.Tensor_mode, _aten.div.Scalar_mode)
    add(_fmod, _aten.fmod.Scalar, _aten.fmod.Tensor, _aten.remainder.Scalar, _aten.remainder.Tensor)
    add(_pow, _aten.pow.Tensor_Scalar, _aten.pow.Tensor_Tensor, _aten.pow.Scalar)
    for name, kind, negated in (("eq", "Equal", False), ("ne", "Equal", True), ("lt", "Less", False),
                                ("le", "LessOrEqual", False), ("gt", "Greater", False), ("ge", "GreaterOrEqual", False)):  # fmt: skip
        add(_comparison(kind, negated), getattr(_aten, name).Tensor, getattr(_aten, name).Scalar)
    add(_logical("And"), _aten.logical_and.default, _aten.bitwise_and.Tensor, getattr(_aten, "__and__").Tensor)
    add(_logical("Or"), _aten.logical_or.default, _aten.bitwise_or.Tensor, getattr(_aten, "__or__").Tensor)
    add(_logical("Xor"), _aten.logical_xor.default, _aten.bitwise_xor.Tensor)
    add(_logical("Not"), _aten.logical_not.default, _aten.bitwise_not.default)
    add(_where, _aten.where.self, _aten.where.ScalarOther, _aten.where.ScalarSelf, _aten.where.Scalar)
    add(_masked_fill, _aten.masked_fill.Scalar, _aten.masked_fill.Tensor, _aten.masked_fill_.Scalar)
    add(_clamp, _aten.clamp.default, _aten.clamp.Tensor, _aten.clamp_min.default, _aten.clamp_max.default)
    table[_aten.clamp_max.default] = lambda walker, node: walker.op(
        "Min", [walker.value(node.args[0], _out(node)), walker.value(node.args[1], _out(node))]
    )
    add(_to, _aten.to.dtype, _aten.to.dtype_layout, _aten.to.device, _aten.to.other, _aten._to_copy.default, _aten.type_as.default)
    add(_same, _aten.contiguous.default, _aten.clone.default, _aten.alias.default, _aten.detach.default,
        _aten.detach_.default, _aten.lift_fresh_copy.default, _aten.dropout.default)  # fmt: skip
    add(_size_arithmetic("Add"), operator.add)
    add(_size_arithmetic("Sub"), operator.sub)
    add(_size_arithmetic("Mul"), operator.mul)
    add(_size_arithmetic("Div"), operator.floordiv)
    add(_size_arithmetic("Mod"), operator.mod)
    add(_size_arithmetic("Max"), torch.sym_max)
    add(_size_arithmetic("Min"), torch.sym_min)
    return table


TABLE = _table()
__all__ = ["DTYPES", "TABLE", "promoted"]
