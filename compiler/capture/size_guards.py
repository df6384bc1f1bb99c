"""What a program that torch.export traced assumes of its sizes, told to Dynamo, which then compiles anew for others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import SymInt

from optc.compiler import compat
from optc.compiler.capture.dynamo import CapturedGraph
from optc.compiler.diagnostics import TargetError

Assumption = tuple[str, Callable[[], Any]]
"""What is assumed, and whether it holds, as a condition on Dynamo's sizes."""


class SizeGuards:
    """Assumptions on the sizes of a captured graph.

    torch.export and Inductor trace with symbols of their own; each stands for an axis of an input, of which Dynamo has a
    size. Evaluating a condition on such a size while Dynamo compiles makes it a guard of Dynamo's.
    """

    def __init__(self, captured: CapturedGraph, examples: Sequence[Any]) -> None:
        """Raises TargetError: the graph returns a number that it computes of its data."""
        self._rows = [
            (node.name, node.meta["val"].shape, sizes)
            for node, sizes in zip(captured.program.user_inputs(), captured.sizes, strict=True)
        ]
        self._told: set[str] = set()
        self._read = dict(_readers(captured, examples))
        for kind, size in captured.outputs.kinds:
            if kind == "size" and isinstance(size, SymInt) and not size.node.expr.free_symbols <= self._read.keys():
                raise TargetError(
                    "the graph returns a number that it computes of its data",
                    where=str(size),
                    remedy="return it as a tensor",
                )

    def value(self, size: SymInt | int, args: Sequence[Any]) -> int:
        """What a size among the graph's outputs is in a call with arguments `args`."""
        if isinstance(size, int):
            return size
        expression = size.node.expr
        return int(expression.xreplace({s: sympy.Integer(self._read[s](args)) for s in expression.free_symbols}))

    def install(self, *, first: bool) -> None:
        """Tell Dynamo what the program, and what was compiled of it, assume by now.

        Args:
            first: Dynamo is compiling; later nothing new can be told.

        Raises:
            TargetError: there is something new, and Dynamo is not compiling.
        """
        for text, condition in self._assumptions():
            if text in self._told:
                continue
            if not first:
                raise TargetError(
                    "the graph was compiled anew for other weights, and assumes more of its sizes than before",
                    why=text,
                    remedy="torch.compiler.reset(), then call the model again",
                )
            self._told.add(text)
            assert bool(condition()), f"{text} does not hold in the call that it was traced with"

    def _assumptions(self) -> Iterator[Assumption]:
        dynamo: dict[sympy.Symbol, Any] = {}
        later: list[tuple[str, sympy.Expr, SymInt]] = []
        env = None
        for name, shape, sizes in self._rows:
            for axis, (own, size) in enumerate(zip(shape, sizes, strict=True)):
                if not isinstance(size, SymInt):
                    continue
                text = f"axis {axis} of {name} is {own}"
                if isinstance(own, int):
                    yield text, lambda size=size, own=own: size == own  # type: ignore[misc]
                elif own.node.expr.is_Symbol and own.node.expr not in dynamo:
                    dynamo[own.node.expr], env = size, own.node.shape_env
                else:
                    later.append((text, own.node.expr, size))
        for text, expression, size in later:
            yield text, lambda expr=expression, size=size: size == compat.evaluate_size(expr, dynamo)  # type: ignore[misc]
        if env is not None:
            yield from _guards(env, dynamo)


def _guards(env: Any, dynamo: Mapping[sympy.Symbol, Any]) -> Iterator[Assumption]:
    """What tracing assumed of the symbols of a ShapeEnv. Symbols of no input stand for data: asserts check them."""
    for symbol, size in dynamo.items():
        found = env.var_to_range[symbol]
        if found.lower > 2:
            yield f"{symbol} >= {found.lower}", lambda size=size, low=int(found.lower): size >= low  # type: ignore[misc]
        if isinstance(found.upper, sympy.Integer):
            yield f"{symbol} <= {found.upper}", lambda size=size, high=int(found.upper): size <= high  # type: ignore[misc]
    for guard in env.guards:
        expression = env.simplify(guard.expr)
        if expression is not sympy.true and expression.free_symbols <= dynamo.keys():
            yield str(expression), lambda expr=expression: compat.evaluate_size(expr, dynamo)  # type: ignore[misc]


def _readers(captured: CapturedGraph, examples: Sequence[Any]) -> Iterator[tuple[sympy.Symbol, Callable[..., int]]]:
    """Dynamo's symbols, with how each is read off the arguments of a call."""
    for index, example in enumerate(examples):
        if isinstance(example, SymInt) and example.node.expr.is_Symbol:
            yield example.node.expr, lambda args, index=index: int(args[index])
    for index, sizes in zip(captured.arguments.tensors, captured.sizes, strict=False):
        for axis, size in enumerate(sizes):
            if isinstance(size, SymInt) and size.node.expr.is_Symbol:
                yield size.node.expr, lambda args, i=index, axis=axis: _axis(args[i], axis)


def _axis(tensor: torch.Tensor, axis: int) -> int:
    return int(tensor.shape[axis])
