"""Common subexpressions of a graph computed once (Aho, Sethi, Ullman: "Compilers", 1986, ch. 9.2)."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import replace_node

_UNSET: frozenset[object] = frozenset((torch.ops.aten.empty.memory_format, torch.ops.aten.empty_like.default))


def share_expressions(program: Program) -> int:
    """Let equal calls be one, and return how many went.

    Left alone: calls that write, draw random numbers or leave memory unset, and whatever is computed
    from a tensor that some call writes, as its content depends on when it is read.
    """
    first: dict[str, Node] = {}
    written = _written(program)
    removed = 0
    for node in list(program.graph.nodes):
        if node.op != "call_function":
            continue
        reads_written = not written.isdisjoint((node, *node.all_input_nodes)) and not _is_size(node)
        if _is_impure(node.target) or reads_written:
            written.add(node)
            continue
        key = _key(node)
        if key in first:
            replace_node(program, node, first[key])
            removed += 1
        else:
            first[key] = node
    return removed


def _key(node: Node) -> str:
    """Equal for calls with equal results; sizes by their symbols, wherever they are read off."""
    if _is_size(node):
        return f"size {node.meta['val'].node.expr}"
    return f"{node.target} {node.args!r} {node.kwargs!r}"  # nodes print as their names


def _is_size(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.SymInt)


def _written(program: Program) -> set[Node]:
    """Values that a call of the graph writes in place, and those that they are views of."""
    pending = []
    for node in program.graph.nodes:
        if node.op == "call_function" and _is_mutable(node.target):
            schema = node.target._schema.arguments
            named = {**dict(zip((item.name for item in schema), node.args, strict=False)), **node.kwargs}
            pending += [named.get(item.name) for item in schema if item.alias_info and item.alias_info.is_write]
    found: set[Node] = set()
    while pending:
        node = pending.pop()
        if isinstance(node, Node) and node not in found:
            found.add(node)
            pending += node.all_input_nodes if _is_view(node) else []
    return found


def _is_view(node: Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.op == "call_function"
    returns = node.target._schema.returns
    return any(item.alias_info is not None for item in returns)


def _is_mutable(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def _is_impure(target: Any) -> bool:
    if not isinstance(target, torch._ops.OpOverload):
        return False
    random = torch.Tag.nondeterministic_seeded in target.tags
    return target._schema.is_mutable or random or target in _UNSET
