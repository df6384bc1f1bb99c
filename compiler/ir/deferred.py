"""Conditions on sizes that torch.export could not decide, and put into the graph as asserts.

It gives up on conditions that hold for every size, such as `s * min(64, 64 * s) == 64 * s`, and on those that a model
cares about at one size alone, such as `s != 128` where a table of 128 rows is cut to s of them. Deferred, they are calls
of `aten._assert_scalar`; here each is evaluated, at every size where there are few of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from optc.compiler import compat

_ASSERT = torch.ops.aten._assert_scalar.default
_WHOLE = 1 << 12
"""Of a symbol with fewer sizes than this every one is tried; of others the first, the last, and powers of two with
their neighbours."""
_MOST = 1 << 14
"""Most pairs and triples of sizes."""
_SINGLE = 4
"""Most sizes of one symbol for which a condition may fail, where somebody runs the program at each of them."""


@dataclass
class SingleSizes:
    """Single sizes for which a condition of the graph does not hold, and at which somebody runs the program.

    Attributes:
        most: the largest size that is run.
        found: the sizes, by the name of their symbol.
    """

    most: int
    found: dict[str, set[int]] = field(default_factory=dict)

    def take(self, failures: Sequence[tuple[str, dict[str, int]]]) -> bool:
        """Enter the sizes at which one condition fails; False where they are too many, too large, or pairs."""
        if len(failures) > _SINGLE or any(len(sizes) != 1 for _, sizes in failures):
            return False
        pairs = [pair for _, sizes in failures for pair in sizes.items()]
        if any(size > self.most for _, size in pairs):
            return False
        for symbol, size in pairs:
            self.found.setdefault(symbol, set()).add(size)
        return True


def settle_deferred(
    exported: ExportedProgram, excepted: SingleSizes | None = None
) -> tuple[str, dict[str, int]] | None:
    """Take the asserts out of a graph; None where all of them hold for all sizes in range.

    Args:
        excepted: takes single sizes for which a condition on one symbol does not hold: the caller answers for what the
            program computes there. None: there may be none.

    Returns:
        a condition that does not hold, and the first sizes found for which it does not, by symbol.
    """
    graph = exported.graph
    for node in [node for node in graph.nodes if node.target is _ASSERT]:
        found = list(itertools.islice(_counterexamples(node, exported.range_constraints), _SINGLE + 1))
        if found and not (excepted is not None and excepted.take(found)):
            return found[0]
        graph.erase_node(node)
    _drop_unread_sizes(exported)
    return None


def drop_data_asserts(exported: ExportedProgram) -> None:
    """Take out what a model asserts of its data: engines compute, they do not check.

    They stay where tensors have sizes that depend on data, about which they say something.
    """
    nodes = [node for node in exported.graph.nodes if node.target is _ASSERT and _data_symbols(node.args[0])]
    if not nodes or has_data_sizes(exported):
        return
    for node in nodes:
        exported.graph.erase_node(node)
    _drop_unread_sizes(exported)


def has_data_sizes(exported: ExportedProgram) -> bool:
    """Whether a tensor of a graph has a size that depends on data."""
    return any(_data_symbols(size) for node in exported.graph.nodes for size in _shape(node))


def _shape(node: Node) -> Sequence[Any]:
    value = node.meta.get("val")
    return value.shape if isinstance(value, torch.Tensor) else ()


def _data_symbols(value: Any) -> bool:
    """Whether a size, or a condition on sizes, depends on numbers that are read out of tensors."""
    value = value.meta.get("val") if isinstance(value, Node) else value
    if not isinstance(value, torch.SymInt | torch.SymBool | torch.SymFloat):
        return False
    return any(map(compat.is_data_symbol, value.node.expr.free_symbols))


def _drop_unread_sizes(exported: ExportedProgram) -> None:
    sizes = torch.SymInt | torch.SymBool | torch.SymFloat | int
    for node in reversed(list(exported.graph.nodes)):
        if node.op == "call_function" and not node.users and isinstance(node.meta.get("val"), sizes):
            exported.graph.erase_node(node)
    exported.graph_module.recompile()


def _counterexamples(node: Node, ranges: Mapping[Any, Any]) -> Iterator[tuple[str, dict[str, int]]]:
    """The condition of an assert, with sizes for which it does not hold; what a model asserts of its data is none."""
    condition = node.args[0]
    value = condition.meta["val"] if isinstance(condition, Node) else condition
    if not isinstance(value, torch.SymBool):
        if value is not True:
            yield str(node.args[1]), {}
        return
    if _data_symbols(value):
        return
    import sympy as sp

    expression = value.node.expr
    symbols = sorted(expression.free_symbols, key=str)
    if any(symbol not in ranges for symbol in symbols):
        yield str(expression), {}
        return
    for sizes in _sizes(symbols, ranges):
        if expression.xreplace(sizes) not in (True, sp.true):
            yield str(expression), {str(symbol): int(size) for symbol, size in sizes.items()}


def _sizes(symbols: list[Any], ranges: Mapping[Any, Any]) -> Iterator[dict[Any, Any]]:
    import sympy as sp

    axes = [_candidates(int(ranges[symbol].lower), ranges[symbol].upper) for symbol in symbols]
    for values in itertools.islice(itertools.product(*axes), _MOST):
        yield dict(zip(symbols, map(sp.Integer, values), strict=True))


def _candidates(low: int, upper: Any) -> list[int]:
    import sympy as sp

    high = int(upper) if isinstance(upper, int | sp.Integer) else 1 << 40
    if high - low < _WHOLE:
        return list(range(low, high + 1))
    near = {low + step for step in range(64)} | {high - step for step in range(4)}
    near |= {(1 << power) + step for power in range(high.bit_length()) for step in (-1, 0, 1)}
    return sorted(size for size in near if low <= size <= high)
