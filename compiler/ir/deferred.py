"""Conditions on sizes that torch.export could not decide, and put into the graph as asserts.

It gives up on conditions that hold for every size, such as `s * min(64, 64 * s) == 64 * s`, and on those that a model
cares about at one size alone, such as `s != 128` where a table of 128 rows is cut to s of them. Deferred, they are calls
of `aten._assert_scalar`; here each is evaluated, at every size where there are few of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import sympy as sp
import torch
from torch.export import ExportedProgram
from torch.fx import Node

_ASSERT = torch.ops.aten._assert_scalar.default
_WHOLE = 1 << 12
"""Of a symbol with fewer sizes than this every one is tried; of others the first, the last, and powers of two with
their neighbours."""
_MOST = 1 << 14
"""Most pairs and triples of sizes."""


def settle_deferred(exported: ExportedProgram) -> tuple[str, dict[str, int]] | None:
    """Take the asserts out of a graph; None where all of them hold for all sizes in range.

    Returns:
        a condition that does not hold, and the first sizes found for which it does not, by symbol.
    """
    graph = exported.graph
    for node in [node for node in graph.nodes if node.target is _ASSERT]:
        found = _counterexample(node, exported.range_constraints)
        if found is not None:
            return found
        graph.erase_node(node)
    sizes = torch.SymInt | torch.SymBool | torch.SymFloat | int
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users and isinstance(node.meta.get("val"), sizes):
            graph.erase_node(node)
    exported.graph_module.recompile()
    return None


def _counterexample(node: Node, ranges: Mapping[Any, Any]) -> tuple[str, dict[str, int]] | None:
    condition = node.args[0]
    value = condition.meta["val"] if isinstance(condition, Node) else condition
    if isinstance(value, bool):
        return None if value else (str(node.args[1]), {})
    if not isinstance(value, torch.SymBool):
        return str(node.args[1]), {}
    expression = value.node.expr
    symbols = sorted(expression.free_symbols, key=str)
    if any(symbol not in ranges for symbol in symbols):
        return str(expression), {}
    for sizes in _sizes(symbols, ranges):
        if expression.xreplace(sizes) not in (True, sp.true):
            return str(expression), {str(symbol): int(size) for symbol, size in sizes.items()}
    return None


def _sizes(symbols: list[Any], ranges: Mapping[Any, Any]) -> Iterator[dict[Any, Any]]:
    axes = [_candidates(int(ranges[symbol].lower), ranges[symbol].upper) for symbol in symbols]
    for values in itertools.islice(itertools.product(*axes), _MOST):
        yield dict(zip(symbols, map(sp.Integer, values), strict=True))


def _candidates(low: int, upper: Any) -> list[int]:
    high = int(upper) if isinstance(upper, int | sp.Integer) else 1 << 40
    if high - low < _WHOLE:
        return list(range(low, high + 1))
    near = {low + step for step in range(64)} | {high - step for step in range(4)}
    near |= {(1 << power) + step for power in range(high.bit_length()) for step in (-1, 0, 1)}
    return sorted(size for size in near if low <= size <= high)
