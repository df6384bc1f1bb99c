"""optc operators  ->  ATen, and quantized linears  ->  optc.linear_nbits

What is left of the dialect has a C++ kernel in the op library: `optc.paged_attention_`, and `optc.linear_nbits` over
packed codes (see passes/legalization/inductor_linears.py). Torch's own packed int4 product is not used: it is no faster in
bfloat16, 25 times slower than the unquantized product in other types, and its layout is that of one instruction set.
What the packed product cannot take becomes arithmetic before each use.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.fx import Node

from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import drop_dead
from optc.compiler.ops.library import OpSpec, find
from optc.compiler.rewriting.common_subexpressions import share_expressions
from optc.compiler.rewriting.inlining import inline_call
from optc.compiler.rewriting.passes import Match, Miss, Pass, PassContext, PassResult
from optc.compiler.rewriting.weights import prune_contract
from optc.passes.legalization.inductor_linears import PackedProduct


@dataclass(frozen=True, kw_only=True)
class LegalizeInductor(Pass):
    """Everything but optc.paged_attention_ in ATen; quantized linears as optc.linear_nbits.

    Attributes:
        packed: use the packed product where it fits.
    """

    name: ClassVar[str] = "legalize-inductor"
    packed: bool = True

    def run(self, program: Program, context: PassContext) -> PassResult:
        edited = program.clone()
        sites = _calls(edited)
        misses = _pack_linears(edited) if self.packed else []
        calls = _calls(edited)
        left = sum(spec.makes_weight for _, spec in calls)
        for node, spec in calls:
            _inline(edited, node, spec)
        if not sites:
            return PassResult(program, 0, 0)
        share_expressions(edited)  # positions and masks are the same in every layer
        drop_dead(edited)
        notes = (f"{left} weights are dequantized before each use",) if left else ()
        return PassResult(prune_contract(edited).changed(), len(sites), len(sites), tuple(misses), notes)


def _calls(program: Program) -> list[tuple[Node, OpSpec]]:
    """The calls of ops that have a form in plain ATen, in graph order."""
    found = ((node, find(node.target)) for node in program.graph.nodes)
    return [(node, spec) for node, spec in found if spec is not None and spec.aten is not None]


def _pack_linears(program: Program) -> list[Miss]:
    """Replace what the packed product can take; the rest is returned, with reasons."""
    rule, misses = PackedProduct(), []
    for node in list(program.graph.nodes):
        found = rule.match(program, node)
        if isinstance(found, Match):
            rule.rewrite(program, found)
        elif found is not None:
            misses.append(found)
    drop_dead(program)
    return misses


def _inline(program: Program, node: Node, spec: OpSpec) -> None:
    """Spell out a call, or each of its results where it is read."""
    form = spec.aten
    assert form is not None
    if len(spec.op._schema.returns) == 1:
        inline_call(program, node, form)
        return
    for user in list(node.users):
        assert user.target is operator.getitem
        index = user.args[1]
        assert isinstance(index, int)
        user.args, user.kwargs = node.args, node.kwargs
        inline_call(program, user, _result(form, index))
    program.graph.erase_node(node)


def _result(form: Callable[..., Any], index: int) -> Callable[..., Tensor]:
    def result(*args: Any, **kwargs: Any) -> Tensor:
        part = form(*args, **kwargs)[index]
        assert isinstance(part, Tensor)
        return part

    return result
