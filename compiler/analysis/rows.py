"""What views and copies show: the same elements in the same order, in rows [..., C] or in any shape."""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import Node

from optc.compiler.analysis.dataflow import CASTS, COPIES, VIEWS, aten, peel, sole_user, value_of


def forward(node: Node) -> Node:
    """The last node of a chain of copies and views, each the only reader of the one before, of the same rows."""
    while (user := sole_user(node)) is not None and user.target in COPIES | VIEWS | CASTS:
        if user.args[0] is not node or not keeps_rows(user) or value_of(user).dtype != value_of(node).dtype:
            break
        if user.target is aten.dropout.default and user.args[2]:
            break
        node = user
    return node


def keeps_rows(node: Node) -> bool:
    """Whether a view has the rows [..., C] of what it views, one after the other."""
    source = node.args[0]
    assert isinstance(source, Node)
    return value_of(node).shape[-1:] == value_of(source).shape[-1:] and value_of(node).dim() >= 2


def same_rows(node: Node) -> Node:
    """What a chain of copies and views shows the rows of."""
    return _behind(node, keeps_rows)


def same_elements(node: Node) -> Node:
    """What a chain of copies and views shows the elements of, in whichever shape."""
    return _behind(node, lambda _: True)


def _behind(node: Node, through: Callable[[Node], bool]) -> Node:
    while True:
        inner = peel(node)
        if inner.target not in VIEWS or not through(inner):
            return inner
        source = inner.args[0]
        assert isinstance(source, Node)
        node = source
