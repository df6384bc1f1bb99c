"""Activation functions, however a model spells them: found by what they compute."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.fx import Node

from optc.compiler.analysis.dataflow import (
    CASTS,
    COPIES,
    ELEMENTWISE,
    Sizes,
    aten,
    evaluate,
    is_tensor,
    readers,
    truncates,
    value_of,
)

_POINTWISE = (
    CASTS
    | COPIES
    | (ELEMENTWISE - {aten.softmax.int, aten._softmax.default})
    | {
        aten.silu.default,
        aten.gelu.default,
        aten.relu.default,
        aten.erf.default,
        aten.exp.default,
        aten.pow.Tensor_Scalar,
        aten.square.default,
        aten.mul.Scalar,
        aten.add.Scalar,
        aten.div.Scalar,
        aten.clamp_min.default,
        aten.reciprocal.default,
    }
)
"""Operators that compute each element from the elements at the same place."""

_FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "relu": torch.relu,
}

_TOLERANCE = 1e-7
"""Between two spellings in float64; the two GELUs are apart by up to 5e-4."""


def activation_behind(source: Node) -> tuple[Node, str] | None:
    """The node that holds a known activation function of `source` and of nothing else, and the function's name.

    From `source` on, everything is followed that is computed from it, element by element and with numbers alone. Where
    all of that runs together in one node, its values at a row of points say which function it is.
    """
    end = _confluence(source)
    if end is None:
        return None
    points = torch.linspace(-12, 12, 481, dtype=torch.float64)
    computed = evaluate(end, {source: points}, Sizes())
    for name, function in _FUNCTIONS.items():
        if torch.allclose(computed, function(points), rtol=0.0, atol=_TOLERANCE):
            return end, name
    return None


def _confluence(source: Node) -> Node | None:
    """The last node through which all runs that is computed from `source` alone, element by element."""
    made = {source}
    end = None
    pending = [source]
    while pending:
        for user in readers(pending.pop()):
            if user not in made and _is_pointwise(user, made):
                made.add(user)
                pending.append(user)
    for node in sorted(made - {source}):
        inside = {item for item in made if item < node} | {node}
        if all(user in inside for item in inside - {node} for user in readers(item)):
            end = node
    return end


def _is_pointwise(node: Node, made: set[Node]) -> bool:
    if node.op != "call_function" or node.target not in _POINTWISE or not is_tensor(node) or truncates(node):
        return False
    if node.target is aten.dropout.default and node.args[2]:
        return False
    return all(item in made for item in node.all_input_nodes) and value_of(node).is_floating_point()
