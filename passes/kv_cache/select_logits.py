"""head(norm(hidden))  ->  head(norm(hidden[logits_indices])), or head(norm(hidden)[:, tokens - logits_from_end])"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import msgspec
import torch
from torch import Tensor
from torch.export import Dim
from torch.fx import Node

from optc.compiler.analysis.dataflow import CASTS, COPIES, VIEWS, aten, sole_user, value_of
from optc.compiler.analysis.linears import head_linear
from optc.compiler.analysis.norms import norm_call
from optc.compiler.ir.contract import Contract, Input
from optc.compiler.ir.devices import program_device
from optc.compiler.ir.program import Program
from optc.compiler.rewriting.passes import Miss, Pass, PassContext, PassResult
from optc.compiler.rewriting.retrace import Replay, retrace
from optc.compiler.rewriting.weights import prune_contract
from optc.passes.kv_cache.linear import cached_examples
from optc.passes.kv_cache.paged import paged_examples


@dataclass(frozen=True, kw_only=True)
class SelectLogits(Pass):
    """head(norm(hidden)) -> head(norm(hidden[logits_indices])) of a paged program, head(norm(hidden)[:, tokens -
    logits_from_end]) of one with grown linear caches

    Of a prompt only the last token's logits are wanted: the head, the largest weight of many models, is multiplied with
    the rows that `logits_indices` names (in any order), and the logits are [rows, V] instead of [tokens, V]. A norm in
    front of the head that nothing else reads is of these rows too, and stays the head's neighbour for other passes.

    In a program with linear caches each row of a call has rows of its own: `logits_from_end` [1, K] counts back from the
    last token of each, 1 is the last one, and the logits are [B, K, V]. What lies before a row's first new token is that
    token. Runtimes that know nothing of this input get its default, the last token (see exporters/onnx). The norm stays
    in front of the selection, where it is one call with the sum before it.
    """

    name: ClassVar[str] = "select-logits"

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Retrace `program` with the new input."""
        head = head_linear(program)
        cache = program.contract.kv_cache
        grown = cache.kind == "linear" and not cache.in_place and not cache.capacity
        if head is None or not (grown or cache.kind == "paged"):
            return PassResult(program, 0, 0)
        reason = _obstacle(program, head, grown)
        if reason is not None:
            return PassResult(program, 0, 1, (Miss(head.name, reason),))
        return PassResult(prune_contract((_retrace_linear if grown else _retrace)(program, head)), 1, 1)


def _obstacle(program: Program, head: Node, grown: bool) -> str | None:
    if any(program.contract.input_index(role) is not None for role in ("logits_indices", "logits_from_end")):
        return "its rows are selected already"
    shape = value_of(_input(head)).shape
    if grown:
        return None if len(shape) == 3 else f"it reads {list(shape)}"
    return None if len(shape) in (2, 3) and all(size == 1 for size in shape[:-2]) else f"it reads {list(shape)}"


def _input(node: Node) -> Node:
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
        node = _input(found[0])
        if sole_user(node) is not found[0] or not (node.target in CASTS | COPIES or _is_norm(node) or _is_idle(node)):
            return found
        found.insert(0, node)


def _is_norm(node: Node) -> bool:
    norm = norm_call(node)
    return norm is not None and norm.obstacle is None


def _is_idle(node: Node) -> bool:
    """Whether a view has the shape of what it views."""
    return node.target in VIEWS and value_of(node).shape == value_of(_input(node)).shape


class _SelectingReplay(Replay):
    """Runs a program's graph with rows selected of the input of the first of some calls that work on rows."""

    def __init__(self, program: Program, calls: list[Node], select: Callable[[Tensor], Tensor]) -> None:
        super().__init__(program, {})
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
        replay = _SelectingReplay(program, calls, lambda rows: rows.index_select(-2, inputs[place]))
        logits: Tensor = replay.outputs(*inputs[:place], *inputs[place + 1 :])[0]
        return logits

    args, shapes = paged_examples(contract, program_device(program))
    return retrace(program, forward, args, shapes, contract)


def _retrace_linear(program: Program, head: Node) -> Program:
    old = program.contract
    wanted = Input(name="logits_from_end", role="logits_from_end", dtype="int64", dims=(1, "rows"))
    contract = msgspec.structs.replace(old, inputs=(*old.inputs, wanted))
    ids, mask = (old.input_index(role) for role in ("input_ids", "attention_mask"))
    assert ids is not None
    assert mask is not None

    def forward(*inputs: Tensor) -> Any:
        *before, from_end = inputs
        total = before[mask].sum(1)
        fresh = total - (total - before[ids].shape[1]).clamp(min=0)

        def select(rows: Tensor) -> Tensor:
            places = (fresh[:, None] - from_end).clamp(min=0)
            return rows.gather(1, places[..., None].expand(-1, -1, rows.shape[2]))

        return tuple(_SelectingReplay(program, [head], select).outputs(*before))

    args, shapes = cached_examples(program)
    example = torch.ones((1, 3), dtype=torch.long, device=program_device(program))
    return retrace(program, forward, [*args, example], [*shapes, {1: Dim("rows", min=1)}], contract)


def _contract(old: Contract) -> Contract:
    """With the new input in front of the pools."""
    place = old.input_index("key_cache")
    assert place is not None
    indices = Input(name="logits_indices", role="logits_indices", dtype="int64", dims=("rows",))
    return msgspec.structs.replace(old, inputs=(*old.inputs[:place], indices, *old.inputs[place:]))
