"""logits  ->  logits, hidden [, aux_hidden]: hidden states of a paged decoder as further outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Node

from optc.compiler.analysis.bottlenecks import layer_inputs
from optc.compiler.analysis.dataflow import aten, value_of
from optc.compiler.analysis.weight_parts import logits_linear
from optc.compiler.ir.contract import Output
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import add_output, insert_call
from optc.compiler.rewriting.passes import Miss, Pass, PassContext, PassResult
from optc.passes.kv_cache.selecting import head_input


@dataclass(frozen=True, kw_only=True)
class ExposeHidden(Pass):
    """logits  ->  logits, hidden [, aux_hidden]

    Outputs of a paged decoder, of the compute type:

    - hidden [n, C], at the positions of the logits: what the head reads, behind the last norm; Medusa's heads read it (Cai
      et al. 2024, https://arxiv.org/abs/2401.10774).
    - aux_hidden [tokens, C * layers], of all tokens, whichever logits are selected: what some layers read, one beside the
      other: the residual stream in front of each. The drafter of EAGLE-3 reads it, and has a cache that needs every token
      of a prompt (Li et al. 2025, https://arxiv.org/abs/2503.01840).

    All are found by dataflow: the head is the linear that makes the logits; a layer's input is the last tensor in front of
    its attention that all paths from the tokens to the logits go through. The logits are what they were.

    Attributes:
        final: expose `hidden`.
        layers: of which to expose the inputs, counted from 0, or from the last one (-1) back.
    """

    name: ClassVar[str] = "expose-hidden"

    final: bool = True
    layers: tuple[int, ...] = ()

    def run(self, program: Program, context: PassContext) -> PassResult:
        edited = program.clone()
        asked = self.final + len(self.layers)
        obstacle = _obstacle(edited)
        if obstacle is not None:
            return PassResult(program, 0, asked, (Miss("logits", obstacle),))
        parts = _layers(edited, self.layers)
        misses = tuple(item for item in parts if isinstance(item, Miss))
        head = exposable_head(edited) if self.final else None
        misses += (Miss("logits", "no linear makes them of [tokens, C]"),) if self.final and head is None else ()
        found = [item for item in parts if isinstance(item, Node)]
        if misses:
            return PassResult(program, 0, asked, misses)
        if head is not None:
            edited = add_output(edited, head_rows(edited, head), Output(name="hidden", role="hidden"))
        if found:
            count = len(layer_inputs(edited))
            numbers = tuple(number % count for number in self.layers)
            spec = Output(name="aux_hidden", role="aux_hidden", layers=numbers)
            edited = add_output(edited, _beside(edited, found), spec)
        return PassResult(edited, asked, asked)


def exposable_head(program: Program) -> Node | None:
    """The linear that makes the logits [n, V] of [n, C] or [1, n, C]; None where there is none of this form."""
    head = logits_linear(program)
    return head if head is not None and value_of(head_input(head)).dim() in (2, 3) else None


def head_rows(program: Program, head: Node) -> Node:
    """What the head reads, as [n, C]: made in a clone under edit."""
    return _flat(program, head_input(head))


def _obstacle(program: Program) -> str | None:
    if program.contract.kv_cache.kind != "paged" or not any(spec.role == "logits" for spec in program.contract.outputs):
        return "the program is no decoder with a paged KV cache: page-kv-cache comes first"
    roles = {spec.role for spec in program.contract.outputs}
    return f"the program gives {', '.join(sorted(roles))}" if roles & {"hidden", "aux_hidden"} else None


def _layers(program: Program, numbers: tuple[int, ...]) -> list[Node | Miss]:
    inputs = layer_inputs(program)
    found: list[Node | Miss] = []
    for number in numbers:
        if not -len(inputs) <= number < len(inputs):
            found.append(Miss(f"layer {number}", f"the program has {len(inputs)}"))
            continue
        node = inputs[number]
        if node is None or value_of(node).dim() not in (2, 3):
            found.append(
                Miss(f"layer {number}", "no one tensor [tokens, C] leads from the layer before it to this one")
            )
        else:
            found.append(node)
    return found


def _beside(program: Program, nodes: list[Node]) -> Node:
    """[tokens, sum of C] of several tensors of all tokens."""
    output = program.graph.output_node()
    parts = [_flat(program, node) for node in nodes]
    return insert_call(program, output, aten.cat.default, (parts, -1)) if len(parts) > 1 else parts[0]


def _flat(program: Program, node: Node) -> Node:
    """[n, C] of [1, n, C]."""
    if value_of(node).dim() == 2:
        return node
    return insert_call(program, program.graph.output_node(), aten.select.int, (node, 0, 0))
