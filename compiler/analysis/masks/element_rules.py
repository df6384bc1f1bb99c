"""How operators make elements: a rule for each operator that masks and positions are made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy as sp
import torch
from torch.fx import Node

from optc.compiler.analysis.masks.element_moves import MOVES, first_tensor
from optc.compiler.analysis.masks.elements import (
    Elements,
    Index,
    Rule,
    UnprovenError,
    Where,
    bare_symbols,
    number,
    operator_name,
    registrar,
    shape_of,
    truth,
)

_RULES: dict[str, Rule] = dict(MOVES)
_rule = registrar(_RULES)
_WRAPPING = (torch.uint8, torch.int8, torch.int16)


def find_rule(node: Node) -> Rule | None:
    """The rule of a call, or None."""
    return _RULES.get(operator_name(node))


def _is_bool(node: Node) -> bool:
    return bool(node.meta["val"].dtype == torch.bool)


def _choose(node: Node, condition: Any, then: Any, other: Any) -> Any:
    """`condition ? then : other` as an element of `node`."""
    if _is_bool(node):
        condition, then, other = truth(condition), truth(then), truth(other)
        return sp.Or(sp.And(condition, then), sp.And(sp.Not(condition), other))
    return Where(truth(condition), number(then), number(other))


# -- made from nothing ---------------------------------------------------------------------------


def _filled(node: Node, value: Any) -> Any:
    return truth(value) if _is_bool(node) else number(value)


@_rule("ones", "ones_like", "new_ones")
def _ones(elements: Elements, node: Node, index: Index) -> Any:
    return _filled(node, sp.Integer(1))


@_rule("zeros", "zeros_like", "new_zeros", "zero")
def _zeros(elements: Elements, node: Node, index: Index) -> Any:
    return _filled(node, sp.Integer(0))


@_rule("full", "full_like", "new_full", "scalar_tensor", "fill")
def _full(elements: Elements, node: Node, index: Index) -> Any:
    position = {"scalar_tensor": 0, "new_full": 2}.get(operator_name(node), 1)
    return _filled(node, elements.operand(node.args[position], (), node))


@_rule("arange")
def _arange(elements: Elements, node: Node, index: Index) -> Any:
    sizes = [elements.size(argument, node) for argument in node.args]
    start = sizes[0] if len(sizes) > 1 else sp.Integer(0)
    return start + index[0] * (sizes[2] if len(sizes) > 2 else 1)


# -- the same values in another type -------------------------------------------------------------


@_rule("copy")
def _copy(elements: Elements, node: Node, index: Index) -> Any:
    return _filled(node, elements.operand(node.args[1], index, node))


@_rule("to", "_to_copy", "type_as")
def _cast(elements: Elements, node: Node, index: Index) -> Any:
    source = first_tensor(node)
    value, old, new = elements.at(source, index, node), source.meta["val"].dtype, node.meta["val"].dtype
    if old == new:
        return value
    if new == torch.bool:
        return truth(value)
    value = number(value)
    if old.is_floating_point and not new.is_floating_point and not value.is_integer:
        raise UnprovenError(f"{node.name} truncates fractions")
    return value


# -- positions -----------------------------------------------------------------------------------


def _elsewhere(elements: Elements, node: Node, source: Any, index: Index, axis: int, place: Any) -> Any:
    assert isinstance(source, Node)
    return number(elements.at(source, (*index[:axis], place, *index[axis + 1 :]), node))


@_rule("diff")
def _diff(elements: Elements, node: Node, index: Index) -> Any:
    """x[i] - x[i - 1] with one element before the first, where that is the same number throughout."""
    given: list[Any] = [*node.args, *(None, 1, -1, None, None)[len(node.args) :]]
    source, order, axis, before, after = given
    if order != 1 or after is not None or not isinstance(before, Node) or not isinstance(axis, int):
        raise UnprovenError(f"{node.name} is not a difference of neighbours")
    axis %= len(index)
    if shape_of(before)[axis] != 1:
        raise UnprovenError(f"{node.name} is not a difference of neighbours")
    place = sp.Symbol("i", integer=True, nonnegative=True)

    def at(tensor: Any, where: Any) -> Any:
        return _elsewhere(elements, node, tensor, index, axis, where)

    inner = sp.expand(at(source, place) - at(source, place - 1))
    first = sp.expand(at(source, sp.Integer(0)) - at(before, sp.Integer(0)))
    if inner != first or not inner.is_number:
        raise UnprovenError(f"{node.name} does not hold the same value everywhere")
    return inner


@_rule("cumsum")
def _cumsum(elements: Elements, node: Node, index: Index) -> Any:
    axis = int(node.args[1]) % len(index)
    place = sp.Symbol("i", integer=True, nonnegative=True)
    step = _elsewhere(elements, node, first_tensor(node), index, axis, place)
    if not step.is_number:
        raise UnprovenError(f"{node.name} sums values that are not the same everywhere")
    return step * (index[axis] + 1)


@_rule("tril", "triu")
def _triangle(elements: Elements, node: Node, index: Index) -> Any:
    diagonal = elements.size(node.args[1] if len(node.args) > 1 else 0, node)
    beyond = index[-1] - index[-2]
    inside = sp.Le(beyond, diagonal) if operator_name(node) == "tril" else sp.Ge(beyond, diagonal)
    return _choose(node, inside, elements.at(first_tensor(node), index, node), sp.Integer(0))


# -- arithmetic and logic ------------------------------------------------------------------------


def _elementwise(arity: int, compute: Callable[..., Any], convert: Callable[[Any], Any]) -> Rule:
    def rule(elements: Elements, node: Node, index: Index) -> Any:
        if node.kwargs or len(node.args) != arity:
            raise UnprovenError(f"{node.name} ({node.target}) has options that are not supported")
        values = [convert(elements.operand(item, index, node)) for item in node.args]
        if sp.nan in values:
            raise UnprovenError(f"{node.name} reads NaN")
        return compute(*values)

    return rule


def _logic(arity: int, compute: Callable[..., Any], *, bitwise: bool) -> Rule:
    plain = _elementwise(arity, compute, truth)

    def rule(elements: Elements, node: Node, index: Index) -> Any:
        if bitwise and not _is_bool(node):
            raise UnprovenError(f"{node.name} ({node.target}) works on the bits of numbers")
        return plain(elements, node, index)

    return rule


def _arithmetic(arity: int, numbers: Callable[..., Any], truths: Callable[..., Any] | None = None) -> Rule:
    """A rule of an operator on numbers, which may mean logic on truth values."""
    plain = _elementwise(arity, numbers, number)
    logic = None if truths is None else _elementwise(arity, truths, truth)

    def rule(elements: Elements, node: Node, index: Index) -> Any:
        if node.meta["val"].dtype in _WRAPPING:
            raise UnprovenError(f"{node.name} ({node.target}) may overflow {node.meta['val'].dtype}")
        if not _is_bool(node):
            return plain(elements, node, index)
        if logic is None:
            raise UnprovenError(f"{node.name} ({node.target}) of booleans is not supported")
        return logic(elements, node, index)

    return rule


_RULES.update(
    {
        name: _elementwise(2, compute, number)
        for name, compute in {"le": sp.Le, "lt": sp.Lt, "ge": sp.Ge, "gt": sp.Gt, "eq": sp.Eq, "ne": sp.Ne}.items()
    }
)
for _name, _arity, _compute in (("and", 2, sp.And), ("or", 2, sp.Or), ("not", 1, sp.Not)):
    _RULES[f"logical_{_name}"] = _logic(_arity, _compute, bitwise=False)
    _RULES[f"bitwise_{_name}"] = _RULES[f"__{_name}__"] = _logic(_arity, _compute, bitwise=True)
_RULES["add"] = _arithmetic(2, lambda left, right: left + right, sp.Or)
_RULES["sub"] = _arithmetic(2, lambda left, right: left - right)
_RULES["rsub"] = _arithmetic(2, lambda left, right: right - left)
_RULES["neg"] = _arithmetic(1, lambda value: -value)


_plain_product = _arithmetic(2, lambda left, right: left * right, sp.And)


@_rule("mul")
def _multiply(elements: Elements, node: Node, index: Index) -> Any:
    """A product; positions may be multiplied with whole numbers only, other products are rounded."""
    factors = [elements.operand(item, index, node) for item in node.args]
    fraction = any(not bare_symbols(item) and number(item).is_integer is False for item in factors)
    if fraction and any(bare_symbols(item) for item in factors):
        raise UnprovenError(f"{node.name} multiplies positions or padding with a fraction")
    return _plain_product(elements, node, index)


@_rule("div")
def _divide(elements: Elements, node: Node, index: Index) -> Any:
    dividend, divisor = (elements.operand(item, index, node) for item in node.args)
    if node.kwargs or not divisor.is_number or divisor == 0 or bare_symbols(dividend):
        raise UnprovenError(f"{node.name} divides {dividend} by {divisor}")
    return number(dividend) / divisor


@_rule("where")
def _where(elements: Elements, node: Node, index: Index) -> Any:
    if len(node.args) != 3:
        raise UnprovenError(f"{node.name} computes the indices of nonzero elements")
    return _choose(node, *(elements.operand(item, index, node) for item in node.args))


@_rule("masked_fill")
def _masked_fill(elements: Elements, node: Node, index: Index) -> Any:
    value, mask, filling = (elements.operand(item, index, node) for item in node.args)
    return _choose(node, mask, filling, value)
