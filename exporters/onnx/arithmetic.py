"""Lowerings of arithmetic, comparisons and logic, with ATen's type promotion and signs."""

from __future__ import annotations

import operator
from typing import Any

import onnx_ir as ir
import torch
from torch.fx import Node

from optc.exporters.onnx.walker import Lowering, Walker, result_dtype

_aten = torch.ops.aten
_ON_BOOLS = {"Add": "Or", "Mul": "And", "Max": "Or", "Min": "And"}
_ON_SIZES = {
    "Add": operator.add,
    "Sub": operator.sub,
    "Mul": operator.mul,
    "Mod": operator.mod,
    "FloorDiv": operator.floordiv,
    "Max": torch.sym_max,
    "Min": torch.sym_min,
}


def _pair(walker: Walker, node: Node, dtype: torch.dtype) -> tuple[ir.Value, ir.Value]:
    """The first two arguments of a node in one type."""
    return walker.value(node.args[0], dtype), walker.value(node.args[1], dtype)


def _binary(kind: str) -> Lowering:
    """add, sub, mul, maximum, minimum; `alpha` multiplies the second operand."""

    def lower(walker: Walker, node: Node) -> ir.Value:
        dtype = result_dtype(node)
        left, right = _pair(walker, node, dtype)
        alpha = _alpha(node)
        if alpha != 1:
            right = walker.op("Mul", [right, walker.constant(alpha, dtype)])
        return walker.op(_ON_BOOLS[kind] if dtype is torch.bool else kind, [left, right])

    return lower


def _alpha(node: Node) -> Any:
    return (*node.args, node.kwargs.get("alpha", 1))[2]


def _reversed_subtract(walker: Walker, node: Node) -> ir.Value:
    """rsub: other - alpha * self."""
    dtype = result_dtype(node)
    left, right = _pair(walker, node, dtype)
    if _alpha(node) != 1:
        left = walker.op("Mul", [left, walker.constant(_alpha(node), dtype)])
    return walker.op("Sub", [right, left])


# -- division ---------------------------------------------------------------------------------


def _remainder(walker: Walker, dtype: torch.dtype, left: ir.Value, right: ir.Value) -> ir.Value:
    """The remainder with the sign of the divisor, exact as C's fmod is."""
    if not dtype.is_floating_point:
        return walker.op("Mod", [left, right])
    rest = walker.op("Mod", [left, right], {"fmod": 1})
    zero = walker.constant(0, dtype)
    opposed = walker.op("Less", [walker.op("Mul", [rest, right]), zero])
    return walker.op("Where", [opposed, walker.op("Add", [rest, right]), rest])


def _floor_divide(walker: Walker, dtype: torch.dtype, left: ir.Value, right: ir.Value) -> ir.Value:
    """floor(left / right) as Python has it: 1.0 // 0.1 is 9, since 0.1 is a little more than a tenth."""
    whole = walker.op("Sub", [left, _remainder(walker, dtype, left, right)])
    out = walker.op("Div", [whole, right])
    return walker.op("Round", [out]) if dtype.is_floating_point else out


def _divide(walker: Walker, node: Node) -> ir.Value:
    dtype, mode = result_dtype(node), node.kwargs.get("rounding_mode")
    if node.target is _aten.floor_divide.default:
        mode = "floor"
    left, right = _pair(walker, node, dtype)
    if mode == "floor":
        return _floor_divide(walker, dtype, left, right)
    out = walker.op("Div", [left, right])
    if mode == "trunc" and dtype.is_floating_point:
        negative = walker.op("Less", [out, walker.constant(0, dtype)])
        return walker.op("Where", [negative, walker.op("Ceil", [out]), walker.op("Floor", [out])])
    return out


def _modulo(walker: Walker, node: Node) -> ir.Value:
    """remainder (sign of the divisor) and fmod (sign of the dividend)."""
    dtype = result_dtype(node)
    left, right = _pair(walker, node, dtype)
    if node.target in (_aten.fmod.Scalar, _aten.fmod.Tensor):
        return walker.op("Mod", [left, right], {"fmod": 1})
    return _remainder(walker, dtype, left, right)


def _pow(walker: Walker, node: Node) -> ir.Value:
    dtype, (base, exponent) = result_dtype(node), node.args[:2]
    if not isinstance(exponent, Node) and exponent == 2:
        x = walker.value(base, dtype)
        return walker.op("Mul", [x, x])
    return walker.op("Pow", list(_pair(walker, node, dtype)))


# -- comparisons and logic --------------------------------------------------------------------


def _meeting(node: Node) -> torch.dtype:
    """The type in which the operands of a comparison meet."""
    operands: list[Any] = []
    for item in node.args[:2]:
        val = item.meta["val"] if isinstance(item, Node) else item
        operands.append(val if isinstance(val, torch.Tensor | int | float | bool) else 0)  # a size: some int
    return torch.result_type(*operands)


def _comparison(kind: str, *, negated: bool = False) -> Lowering:
    def lower(walker: Walker, node: Node) -> ir.Value:
        dtype = _meeting(node)
        if dtype is torch.bool and kind != "Equal":
            dtype = torch.int32  # ONNX orders no bools
        out = walker.op(kind, list(_pair(walker, node, dtype)))
        return walker.op("Not", [out]) if negated else out

    return lower


def _logical(kind: str) -> Lowering:
    """and, or, xor, not: on bools the logical operator, on integers the bitwise one."""

    def lower(walker: Walker, node: Node) -> ir.Value:
        dtype = result_dtype(node)
        name = kind if dtype is torch.bool else f"Bitwise{kind}"
        return walker.op(name, [walker.value(item, dtype) for item in node.args[:2]])

    return lower


# -- sizes ------------------------------------------------------------------------------------


def _size_arithmetic(kind: str) -> Lowering:
    def lower(walker: Walker, node: Node) -> ir.Value:
        left, right = (walker.size(item) for item in node.args)
        if kind == "FloorDiv":
            return _floor_divide(walker, torch.int64, left, right)
        return walker.op(kind, [left, right])

    return lower


def _table() -> dict[Any, Lowering]:
    table: dict[Any, Lowering] = {}

    def add(lower: Lowering, *targets: Any) -> None:
        table.update(dict.fromkeys(targets, lower))

    add(_binary("Add"), _aten.add.Tensor, _aten.add.Scalar, _aten.add_.Tensor)
    add(_binary("Sub"), _aten.sub.Tensor, _aten.sub.Scalar, _aten.sub_.Tensor)
    add(_binary("Mul"), _aten.mul.Tensor, _aten.mul.Scalar, _aten.mul_.Tensor)
    add(_binary("Max"), _aten.maximum.default)
    add(_binary("Min"), _aten.minimum.default)
    add(_reversed_subtract, _aten.rsub.Scalar)
    add(
        _divide,
        _aten.div.Tensor,
        _aten.div.Scalar,
        _aten.div_.Tensor,
        _aten.div.Tensor_mode,
        _aten.div.Scalar_mode,
        _aten.floor_divide.default,
    )
    add(_modulo, _aten.fmod.Scalar, _aten.fmod.Tensor, _aten.remainder.Scalar, _aten.remainder.Tensor)
    add(_pow, _aten.pow.Tensor_Scalar, _aten.pow.Tensor_Tensor, _aten.pow.Scalar)
    for name, kind in (
        ("eq", "Equal"),
        ("lt", "Less"),
        ("le", "LessOrEqual"),
        ("gt", "Greater"),
        ("ge", "GreaterOrEqual"),
    ):
        add(_comparison(kind), getattr(_aten, name).Tensor, getattr(_aten, name).Scalar)
    add(_comparison("Equal", negated=True), _aten.ne.Tensor, _aten.ne.Scalar)
    for kind in ("And", "Or", "Xor"):
        plain, bitwise, dunder = (
            getattr(_aten, form.format(kind.lower())) for form in ("logical_{}", "bitwise_{}", "__{}__")
        )
        add(_logical(kind), plain.default, bitwise.Tensor, dunder.Tensor, dunder.Scalar)
    add(lambda walker, node: walker.op("Neg", [walker.size(node.args[0])]), operator.neg)
    add(_logical("Not"), _aten.logical_not.default, _aten.bitwise_not.default)
    for kind, target in _ON_SIZES.items():
        add(_size_arithmetic(kind), target)
    return table


TABLE = _table()
