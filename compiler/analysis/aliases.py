"""Which memory a graph overwrites, and when.

Exported graphs are not functional: `masked_fill_` on a mask, or `fill_` on a view of it, changes what
later nodes read under the old name. Whoever reasons about values across nodes asks here first.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Graph, Node

aten = torch.ops.aten

_MAY_ALIAS = frozenset(
    (
        operator.getitem,
        aten.dropout.default,
        aten.type_as.default,
        aten.lift_fresh.default,
    )
)
"""Calls that may return (a part of) their first argument and do not say so in their schema."""


class Storage:
    """Who shares memory with whom in a graph, and the calls that write it."""

    def __init__(self, graph: Graph) -> None:
        self._order: dict[Node, int] = {}
        self._root: dict[Node, Node] = {}
        self._writes: dict[Node, list[tuple[int, Node]]] = defaultdict(list)
        for position, node in enumerate(graph.nodes):
            source = _alias_source(node)
            self._order[node] = position
            self._root[node] = node if source is None else self._root[source]
            for written in _written(node):
                self._writes[self._root[written]].append((position, node))

    def overwritten(self, node: Node, reader: Node, since: Node | None = None) -> Node | None:
        """A call between `node` (or `since`) and its reader that writes the memory of `node`, or None."""
        writes = self._writes.get(self._root.get(node, node))
        if not writes:
            return None
        first, last = self._order[since or node], self._order[reader]
        return next((call for position, call in writes if first < position < last), None)

    def written(self, node: Node) -> bool:
        """Whether any call writes the memory of `node`; such a weight is not a constant."""
        return bool(self._writes.get(self._root.get(node, node)))

    def replaced(self, old: Node, new: Node) -> None:
        """Tell that `new` stands where `old` stood."""
        self._order[new], self._root[new] = self._order[old], self._root[old]


def _alias_source(node: Node) -> Node | None:
    """The argument whose memory the result may share."""
    if node.target in _MAY_ALIAS:
        source = node.args[0]
        return source if isinstance(source, Node) else None
    return next((value for argument, value in _arguments(node) if argument.alias_info is not None), None)


def _written(node: Node) -> Iterator[Node]:
    for argument, value in _arguments(node):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield value


def _arguments(node: Node) -> Iterator[tuple[Any, Node]]:
    """(schema argument, node) of a call of an operator; the nodes of a list one by one."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or node.op != "call_function":
        return
    for index, argument in enumerate(schema.arguments):
        value: Any = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
        for item in value if isinstance(value, list | tuple) else (value,):
            if isinstance(item, Node):
                yield argument, item


_MAY_SHARE = (*_MAY_ALIAS - {operator.getitem}, aten.einsum.default, aten._unsafe_view.default)
"""Views, at times, whose schemas do not say so."""


def unshared(node: Node) -> str | None:
    """A predicate for in-place operators: nothing else sees the memory that they write.

    Reads that come later go through the in-place node itself, as torch.export traces them. What
    cannot be lowered are views: of the written tensor, or a written tensor that is one.
    """
    written = node.args[0]
    if written.op != "call_function" or _shares(written):
        return "it writes to an input, a weight or a view"
    if any(_shares(user) or user > node for user in written.users if user is not node):
        return "it writes to a tensor that has views, or is read later as it was"
    return None


def _shares(node: Node) -> bool:
    """Whether a node's result may be memory of its input: views, and in-place operators behind views."""
    if node.target is operator.getitem:  # one of several results
        return _shares(node.args[0])
    schema = getattr(node.target, "_schema", None)
    if schema is None or node.target in _MAY_SHARE:
        return True
    if schema.is_mutable:
        return _shares(node.args[0]) if isinstance(node.args[0], Node) else True
    return any(item.alias_info is not None for item in schema.returns)
