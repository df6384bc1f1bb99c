"""head(norm(hidden))  ->  head(norm(hidden[rows])), for the passes that add caches.

Of a prompt only the last token's logits are wanted: the head, the largest weight of many models, is multiplied with the
rows that an input names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Node

from optc.compiler.analysis.dataflow import CASTS, COPIES, VIEWS, aten, sole_user, value_of
from optc.compiler.analysis.linears import head_linear
from optc.compiler.analysis.norms import norm_call
from optc.compiler.ir.program import Program
from optc.compiler.rewriting.retrace import Handler, Replay


def selectable_head(program: Program) -> tuple[Node | None, str]:
    """The linear that makes logits [B, S, V] of [B, S, C], or None and why there is none."""
    head = head_linear(program)
    if head is None:
        return None, "no linear makes them"
    shape = value_of(head_input(head)).shape
    return (head, "") if len(shape) == 3 else (None, f"the head reads {list(shape)}")


def head_input(node: Node) -> Node:
    """The activation that the head, or a call in front of it, reads."""
    source = node.args[_place(node)]
    assert isinstance(source, Node)
    return source


def _place(node: Node) -> int:
    return 1 if node.target is aten.addmm.default else 0


def by_row(head: Node) -> list[Node]:
    """The calls in front of the head that make each of its rows of one row alone, in graph order, up to the head."""
    found = [head]
    while True:
        node = head_input(found[0])
        if sole_user(node) is not found[0] or not (node.target in CASTS | COPIES or _is_norm(node) or _is_idle(node)):
            return found
        found.insert(0, node)


def _is_norm(node: Node) -> bool:
    norm = norm_call(node)
    return norm is not None and norm.obstacle is None


def _is_idle(node: Node) -> bool:
    """Whether a view has the shape of what it views."""
    return node.target in VIEWS and value_of(node).shape == value_of(head_input(node)).shape


@dataclass(frozen=True)
class RowCalls:
    """Names of the first of some calls that work on rows, and of views among them: their shape has the number of tokens.

    Made before a re-trace, in which sizes of the old graph cannot be compared.
    """

    first: str
    idle: frozenset[str]

    @classmethod
    def of(cls, calls: Sequence[Node]) -> RowCalls:
        return cls(calls[0].name, frozenset(node.name for node in calls if _is_idle(node)))


class SelectingReplay(Replay):
    """Runs a program's graph with rows selected of the input of the first of some calls that work on rows."""

    def __init__(
        self,
        program: Program,
        handlers: Mapping[Any, Handler],
        calls: RowCalls,
        select: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__(program, handlers)
        self._calls, self._select = calls, select

    def run_node(self, n: Node) -> Any:
        first, idle = n.name == self._calls.first, n.name in self._calls.idle
        if not first and not idle:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        place = _place(n)
        rows = self._select(args[place]) if first else args[place]
        if idle:
            return rows
        return self.call_function(n.target, (*args[:place], rows, *args[place + 1 :]), kwargs)
