"""head(hidden)  ->  head(hidden[logits_indices])"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import msgspec
import torch
from torch import Tensor
from torch.fx import Node

from optc.compiler.analysis.dataflow import value_of
from optc.compiler.analysis.linears import head_linear
from optc.compiler.ir.contract import Contract, Input
from optc.compiler.ir.devices import program_device
from optc.compiler.ir.program import Program
from optc.compiler.rewriting.passes import Miss, Pass, PassContext, PassResult
from optc.compiler.rewriting.retrace import Replay, retrace
from optc.compiler.rewriting.weights import prune_contract
from optc.passes.kv_cache.paged import paged_examples


@dataclass(frozen=True, kw_only=True)
class SelectLogits(Pass):
    """head(hidden) -> head(hidden[logits_indices]), of a paged program.

    Of a prompt only the last token's logits are wanted: the head, the largest weight of many models, is multiplied with
    the rows that `logits_indices` names (in any order), and the logits are [rows, V] instead of [tokens, V].
    """

    name: ClassVar[str] = "select-logits"

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Retrace `program` with the new input."""
        head = head_linear(program)
        if program.contract.kv_cache.kind != "paged" or head is None:
            return PassResult(program, 0, 0)
        reason = _obstacle(program, head)
        if reason is not None:
            return PassResult(program, 0, 1, (Miss(head.name, reason),))
        return PassResult(prune_contract(_retrace(program, head)), 1, 1)


def _obstacle(program: Program, head: Node) -> str | None:
    if program.contract.input_index("logits_indices") is not None:
        return "its rows are selected already"
    hidden = head.args[1] if head.target is torch.ops.aten.addmm.default else head.args[0]
    assert isinstance(hidden, Node)
    shape = value_of(hidden).shape
    return None if len(shape) in (2, 3) and all(size == 1 for size in shape[:-2]) else f"it reads {list(shape)}"


class _SelectingReplay(Replay):
    """Runs a program's graph with the rows of the input of one linear selected."""

    def __init__(self, program: Program, head: Node, indices: Tensor) -> None:
        super().__init__(program, {})
        self._head, self._indices = head.name, indices

    def run_node(self, n: Node) -> Any:
        if n.name != self._head:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        place = 1 if n.target is torch.ops.aten.addmm.default else 0
        hidden = args[place].index_select(-2, self._indices)
        return self.call_function(n.target, (*args[:place], hidden, *args[place + 1 :]), kwargs)


def _retrace(program: Program, head: Node) -> Program:
    contract = _contract(program.contract)
    place = contract.input_index("logits_indices")
    assert place is not None

    def forward(*inputs: Tensor) -> Tensor:
        replay = _SelectingReplay(program, head, inputs[place])
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
