"""head(norm(hidden))  ->  head(norm(hidden[logits_indices]))"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import msgspec
from torch import Tensor
from torch.fx import Node

from optc.compiler.analysis.dataflow import CASTS, COPIES, VIEWS, aten, sole_user, value_of
from optc.compiler.analysis.linears import head_linear
from optc.compiler.analysis.norms import norm_call
from optc.compiler.ir.contract import Contract, Input
from optc.compiler.ir.devices import program_device
from optc.compiler.ir.program import Program
from optc.compiler.rewriting.passes import Miss, Pass, PassContext, PassResult
from optc.compiler.rewriting.retrace import Handler, Replay, retrace
from optc.compiler.rewriting.weights import prune_contract
from optc.passes.kv_cache.paged import paged_examples


@dataclass(frozen=True, kw_only=True)
class SelectLogits(Pass):
    """head(norm(hidden)) -> head(norm(hidden[logits_indices])) of a paged program

    Of a prompt only the last token's logits are wanted: the head, the largest weight of many models, is multiplied with
    the rows that `logits_indices` names (in any order), and the logits are [rows, V] instead of [tokens, V]. A norm in
    front of the head that nothing else reads is of these rows too, and stays the head's neighbour for other passes.

    Programs with linear caches have a selection of their own: `static-kv-cache` with `select_logits`.
    """

    name: ClassVar[str] = "select-logits"

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Retrace `program` with the new input."""
        head = head_linear(program)
        if head is None or program.contract.kv_cache.kind != "paged":
            return PassResult(program, 0, 0)
        reason = _obstacle(program, head)
        if reason is not None:
            return PassResult(program, 0, 1, (Miss(head.name, reason),))
        return PassResult(prune_contract(_retrace(program, head)), 1, 1)


def _obstacle(program: Program, head: Node) -> str | None:
    if program.contract.input_index("logits_indices") is not None:
        return "its rows are selected already"
    shape = value_of(head_input(head)).shape
    return None if len(shape) in (2, 3) and all(size == 1 for size in shape[:-2]) else f"it reads {list(shape)}"


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


class SelectingReplay(Replay):
    """Runs a program's graph with rows selected of the input of the first of some calls that work on rows."""

    def __init__(
        self,
        program: Program,
        handlers: Mapping[Any, Handler],
        calls: Sequence[Node],
        select: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__(program, handlers)
        self._first, self._select = calls[0].name, select
        self._idle = {node.name for node in calls if _is_idle(node)}  # their shape names the number of tokens

    def run_node(self, n: Node) -> Any:
        if n.name != self._first and n.name not in self._idle:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        place = _place(n)
        rows = self._select(args[place]) if n.name == self._first else args[place]
        if n.name in self._idle:
            return rows
        return self.call_function(n.target, (*args[:place], rows, *args[place + 1 :]), kwargs)


def _retrace(program: Program, head: Node) -> Program:
    contract = _contract(program.contract)
    place = contract.input_index("logits_indices")
    assert place is not None
    calls = by_row(head)

    def forward(*inputs: Tensor) -> Tensor:
        replay = SelectingReplay(program, {}, calls, lambda rows: rows.index_select(-2, inputs[place]))
        logits: Tensor = replay.outputs(*inputs[:place], *inputs[place + 1 :])[0]
        return logits

    args, shapes = paged_examples(contract, program_device(program))
    return retrace(program, forward, args, shapes, contract)


def _contract(old: Contract) -> Contract:
    """With the new input in front of the pools."""
    place = old.input_index("key_cache")
    assert place is not None
    indices = Input(name="logits_indices", role="logits_indices", dtype="int64", dims=("rows",))
    return msgspec.structs.replace(old, inputs=(*old.inputs[:place], indices, *old.inputs[place:]))
