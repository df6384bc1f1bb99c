"""Shape expressions are rebuilt exactly, and nothing else is read."""

from __future__ import annotations

import re

import pytest
import sympy
from torch.utils._sympy.functions import FloorDiv, Max, Mod, PythonMod

from optc.compiler.ir.saved.shape_expressions import parse_shape_expression

S = sympy.Symbol("s7", positive=True, integer=True)
U = sympy.Symbol("u0", integer=True)


@pytest.mark.parametrize(
    "expression",
    [
        S,
        sympy.Integer(-5),
        3 * S + U - 1,
        FloorDiv(S + 3, 4),
        Max(S, U + 2),
        Mod(S, 8),
        PythonMod(U, 3),
        S**2,
        sympy.Rational(1, 3) * S,
        sympy.Float(0.5) * S,
        sympy.Eq(S, 4),
        sympy.And(S >= 2, U < 5),
        sympy.true,
    ],
    ids=str,
)
def test_what_torch_writes_is_read_back(expression: sympy.Basic) -> None:
    assert parse_shape_expression(sympy.srepr(expression)) == expression


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("__import__('os')", "'__import__('os')' is not allowed"),
        ("Integer(1).__class__", "is not allowed"),
        ("[Integer(1) for x in ()]", "is not allowed"),
        ("(lambda: 1)()", "is not allowed"),
        ("S7", "'S7' is not allowed"),
        ("Symbol('os')", "'os' is not the name of a size"),
        ("Symbol('s1', commutative=False)", "symbol s1 has assumptions that no size has"),
        ("Function('f')", "'Function('f')' is not allowed"),
        ("Integer('1')", "is not an integer"),
        ("Integer(True)", "is not an integer"),
        (f"Integer({10**30})", "is not an integer"),
        ("Float('1e999999999', precision=53)", "is not a double"),
        ("Float('1', precision=99999999)", "is not a double"),
        ("Pow(Integer(9), Integer(99999999))", "Pow by 99999999 is not allowed"),
        ("Mul(Pow(Integer(99), Integer(8)), Pow(Integer(99), Integer(8)))", "is too large"),
        ("LShift(Integer(1), Integer(99999999))", "LShift by 99999999 is not allowed"),
        ("Pow()", "Pow of nothing is not a shape expression"),
        ("Add(Integer(1), true)", "Add of 1, True is not a shape expression"),
        ("FloorDiv(Symbol('s1'), Integer(0))", "ZeroDivisionError"),
        ("Rational(Integer(1), Integer(0))", "is not finite"),
        ("(" * 4000, "not a shape expression"),
        ("1" * 8000, "not a shape expression"),
        ("1" * 9000, "not a shape expression"),
        ("Symbol('ｓ1')", "not a shape expression"),
        ("", "not a shape expression"),
    ],
)
def test_anything_else_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_shape_expression(text)
