"""Shape expressions from a file, read without evaluating them.

torch writes the size of an axis as sympy's `srepr`, e.g. `Mul(Integer(2), Symbol('s70', positive=True,
integer=True))`, and reads it back with `sympy.sympify`, which is `eval`. Here the text is parsed and the
expression is built from a fixed table of functions; anything else is refused.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import sympy

from optc.compiler.compat import sympy_functions

_SYMBOL = re.compile(r"(s|u|zf|zuf)[0-9]{1,5}")
_FLOAT = re.compile(r"-?[0-9]{1,20}(\.[0-9]{1,40})?(e[+-]?[0-9]{1,3})?")
_ASSUMPTIONS = {"integer", "positive", "nonnegative", "real", "finite", "nonzero"}
_MAX_LENGTH = 8192
_MAX_INTEGER = 2**63  # beyond any size, stride or offset
_MAX_EXPONENT = 8

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    name: getattr(sympy_functions(), name)
    for name in (
        "FloorDiv",
        "ModularIndexing",
        "Where",
        "PythonMod",
        "Mod",
        "CleanDiv",
        "CeilToInt",
        "FloorToInt",
        "CeilDiv",
        "LShift",
        "RShift",
        "PowByNatural",
        "FloatPow",
        "FloatTrueDiv",
        "IntTrueDiv",
        "IsNonOverlappingAndDenseIndicator",
        "TruncToFloat",
        "TruncToInt",
        "RoundToInt",
        "RoundDecimal",
        "ToFloat",
        "Identity",
        "Max",
        "Min",
    )
} | {
    name: getattr(sympy, name)
    for name in (
        "Add",
        "Mul",
        "Pow",
        "Rational",
        "Abs",
        "And",
        "Or",
        "Not",
        "Equality",
        "Unequality",
        "LessThan",
        "StrictLessThan",
        "GreaterThan",
        "StrictGreaterThan",
    )
}
_LOGIC = {"And", "Or", "Not"}
_GROWING = {"Pow", "PowByNatural", "FloatPow", "LShift", "RShift"}


@lru_cache(maxsize=4096)
def parse_shape_expression(text: str) -> sympy.Basic:
    """The sympy expression that `text` (sympy's srepr) stands for.

    Raises:
        ValueError: not an expression over sizes; says which part is not.
    """
    if len(text) > _MAX_LENGTH or not (text.isascii() and text.isprintable()):
        raise ValueError("not a shape expression")
    try:
        return _build(ast.parse(text, mode="eval").body)
    except (SyntaxError, RecursionError, MemoryError, TypeError, ArithmeticError, AttributeError) as error:
        raise ValueError(f"not a shape expression: {type(error).__name__}: {error}") from error


def _build(tree: ast.expr) -> Any:
    match tree:
        case ast.Call(func=ast.Name(id="Symbol"), args=[ast.Constant(value=str(name))], keywords=keywords):
            return _symbol(name, keywords)
        case ast.Call(func=ast.Name(id="Integer"), args=[number], keywords=[]):
            return sympy.Integer(_integer(number))
        case ast.Call(func=ast.Name(id="Float"), args=[ast.Constant(value=str(number))], keywords=keywords):
            return _float(number, keywords)
        case ast.Call(func=ast.Name(id=name), args=arguments, keywords=[]) if name in _FUNCTIONS:
            return _call(name, [_build(argument) for argument in arguments])
        case ast.Name(id="true" | "false" as name):
            return sympy.true if name == "true" else sympy.false
        case ast.Constant() | ast.UnaryOp():
            return sympy.Integer(_integer(tree))
    raise ValueError(f"'{ast.unparse(tree)[:80]}' is not allowed in a shape expression")


def _call(name: str, arguments: list[Any]) -> Any:
    if not arguments:
        raise ValueError(f"{name} of nothing is not a shape expression")
    if name in _GROWING:
        power = arguments[-1]
        if not (power.is_number and abs(power) <= (_MAX_EXPONENT if "Pow" in name else 63)):
            raise ValueError(f"{name} by {power} is not allowed in a shape expression")
    kinds = [
        sympy.logic.boolalg.Boolean if name in _LOGIC or (name, i) == ("Where", 0) else sympy.Expr
        for i in range(len(arguments))
    ]
    if not all(isinstance(argument, kind) for argument, kind in zip(arguments, kinds, strict=True)):
        raise ValueError(f"{name} of {', '.join(map(str, arguments))} is not a shape expression")
    value = _FUNCTIONS[name](*arguments)
    if value.has(sympy.nan, sympy.zoo, sympy.oo, -sympy.oo):
        raise ValueError(f"{name} of {', '.join(map(str, arguments))} is not finite")
    if value.is_number and value.is_Rational and max(abs(value.p), value.q) > _MAX_INTEGER:
        raise ValueError("a number in a shape expression is too large")
    return value


def _integer(tree: ast.expr) -> int:
    sign = 1
    if isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.USub):
        sign, tree = -1, tree.operand
    if not isinstance(tree, ast.Constant) or type(tree.value) is not int or tree.value > _MAX_INTEGER:
        raise ValueError(f"'{ast.unparse(tree)[:80]}' is not an integer of a shape expression")
    return sign * tree.value


def _symbol(name: str, keywords: list[ast.keyword]) -> sympy.Symbol:
    assumptions = _keywords(keywords)
    if not _SYMBOL.fullmatch(name):
        raise ValueError(f"'{name[:80]}' is not the name of a size")
    if not (assumptions.keys() <= _ASSUMPTIONS and all(value is True for value in assumptions.values())):
        raise ValueError(f"symbol {name} has assumptions that no size has")
    return sympy.Symbol(name, **assumptions)


def _float(number: str, keywords: list[ast.keyword]) -> sympy.Float:
    options = _keywords(keywords)
    if not _FLOAT.fullmatch(number) or options != {"precision": 53}:
        raise ValueError(f"'{number[:80]}' is not a double")
    return sympy.Float(number, precision=53)


def _keywords(keywords: list[ast.keyword]) -> dict[str, Any]:
    found = {}
    for keyword in keywords:
        if keyword.arg is None or not isinstance(keyword.value, ast.Constant):
            raise ValueError("not a shape expression")
        found[keyword.arg] = keyword.value.value
    return found
