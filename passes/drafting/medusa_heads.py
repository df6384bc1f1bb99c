"""logits  ->  logits, drafted: the guesses of Medusa heads beside the logits of a paged decoder."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from torch.fx import Node

from optc.compiler.analysis.dataflow import aten, value_of
from optc.compiler.ir.contract import Output
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import add_output, add_weight, insert_call
from optc.compiler.model_folder.medusa import MedusaFolder, MedusaHead
from optc.compiler.rewriting.passes import Miss, Pass, PassContext, PassResult
from optc.passes.drafting.expose_hidden import exposable_head, head_rows
from optc.passes.kv_cache.selecting import head_input


@dataclass(frozen=True, kw_only=True)
class AddMedusaHeads(Pass):
    """logits  ->  logits, drafted

    The heads of a folder (Cai et al. 2024, https://arxiv.org/abs/2401.10774) read what the head of a paged decoder reads, at
    the positions of the logits. drafted, int64 [n, heads * ranks]: where the logits at position i are of token i + 1,
    columns from k * ranks on are the likeliest tokens i + k + 2 of head k, the likeliest first. Tokens alone are given, so
    that no logits travel. Heads without a linear of their own are multiplied with the decoder's, all in one product.

    Attributes:
        folder: of the heads; see `compiler/model_folder/medusa`.
        weights: sha256 of what it holds, so that a stage that was kept is not taken for one with other heads.
        ranks: guesses of each head.
    """

    name: ClassVar[str] = "add-medusa-heads"

    folder: str = ""
    weights: str = ""
    ranks: int = 1

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Add the heads to a clone of `program`.

        Raises:
            InputError: the folder cannot be read, or its heads have other sizes than the decoder.
        """
        found = MedusaFolder.read(Path(self.folder))
        edited = program.clone()
        head = exposable_head(edited)
        obstacle = _obstacle(edited, head)
        if obstacle is not None:
            return PassResult(program, 0, 1, (Miss("logits", obstacle),))
        assert head is not None
        columns, rows = int(value_of(head_input(head)).shape[-1]), int(value_of(head).shape[-1])
        found.check_sizes(columns, rows, Path(self.folder))
        hidden = head_rows(edited, head)
        states = [_state(edited, hidden, k, item) for k, item in enumerate(found.heads)]
        own = found.vocab_size is not None
        drafted = _own(edited, states, found, self.ranks) if own else _shared(edited, states, head, self.ranks)
        count = len(found.heads) * self.ranks
        edited = add_output(edited, drafted, Output(name="drafted", role="drafted", columns=count))
        notes = (
            ()
            if found.origin is not None
            else (f"{self.folder} does not say which weights its heads were trained for",)
        )
        return PassResult(edited, 1, 1, notes=notes)


def _obstacle(program: Program, head: Node | None) -> str | None:
    if program.contract.kv_cache.kind != "paged":
        return "the program is no decoder with a paged KV cache: page-kv-cache comes first"
    if head is None:
        return "no linear makes them of [tokens, C]"
    return "the program has heads" if any(spec.role == "drafted" for spec in program.contract.outputs) else None


def _state(program: Program, hidden: Node, number: int, head: MedusaHead) -> Node:
    """[n, C]: what a head's linear reads."""
    output = program.graph.output_node()
    for place, (weight, bias) in enumerate(head.blocks):
        name = f"medusa_head.{number}.{place}.linear"
        parts = [
            _weight(program, hidden, f"{name}.{part}", item) for part, item in (("weight", weight), ("bias", bias))
        ]
        made = insert_call(program, output, aten.linear.default, (hidden, *parts))
        hidden = insert_call(
            program, output, aten.add.Tensor, (hidden, insert_call(program, output, aten.silu.default, (made,)))
        )
    return hidden


def _weight(program: Program, like: Node, name: str, tensor: Tensor) -> Node:
    value = value_of(like)
    return add_weight(program, name, tensor.to(value.dtype).to(value.device).contiguous())


def _own(program: Program, states: list[Node], found: MedusaFolder, ranks: int) -> Node:
    """int64 [n, heads * ranks], of the linear of each head."""
    output, layers, drafted = program.graph.output_node(), found.config.medusa_num_layers, []
    for number, (state, head) in enumerate(zip(states, found.heads, strict=True)):
        assert head.linear is not None
        weight = _weight(program, state, f"medusa_head.{number}.{layers}.weight", head.linear)
        drafted.append(_likeliest(program, insert_call(program, output, aten.linear.default, (state, weight)), ranks))
    return insert_call(program, output, aten.cat.default, (drafted, 1))


def _shared(program: Program, states: list[Node], head: Node, ranks: int) -> Node:
    """int64 [n, heads * ranks], of the decoder's own linear, which reads the rows of all heads laid end to end."""
    output, source = program.graph.output_node(), head_input(head)
    rows = insert_call(program, output, aten.cat.default, (states, 0)) if len(states) > 1 else states[0]
    args: tuple[Any, ...] = tuple(rows if item is source else item for item in head.args)
    tokens = _likeliest(program, insert_call(program, output, head.target, args, dict(head.kwargs)), ranks)
    table = insert_call(program, output, aten.reshape.default, (tokens, [len(states), -1, ranks]))
    turned = insert_call(program, output, aten.transpose.int, (table, 0, 1))
    whole = insert_call(program, output, aten.contiguous.default, (turned,))
    return insert_call(program, output, aten.reshape.default, (whole, [-1, len(states) * ranks]))


def _likeliest(program: Program, logits: Node, ranks: int) -> Node:
    """int64 [.., n, ranks], of logits [.., n, V]."""
    output = program.graph.output_node()
    if ranks == 1:
        return insert_call(program, output, aten.argmax.default, (logits, -1, True))
    best = insert_call(program, output, aten.topk.default, (logits, ranks))
    return insert_call(program, output, operator.getitem, (best, 1))
