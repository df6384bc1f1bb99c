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

import torch
from torch import Tensor
from torch.fx import Node

from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import drop_dead
from optc.compiler.ops import decompositions
from optc.compiler.ops.library import reference
from optc.compiler.rewriting.common_subexpressions import share_expressions
from optc.compiler.rewriting.inlining import inline_call
from optc.compiler.rewriting.passes import Match, Miss, Pass, PassContext, PassResult
from optc.compiler.rewriting.weights import prune_contract
from optc.passes.legalization.inductor_linears import PackedProduct

optc = torch.ops.optc

ATEN_FORMS: dict[Any, Callable[..., Any]] = {
    optc.attention.default: decompositions.attention,
    optc.cached_attention_.default: decompositions.cached_attention_,
    optc.rotary.default: reference("rotary"),
    optc.rotate_blocks.default: reference("rotate_blocks"),
    optc.dequantize.default: reference("dequantize"),
    optc.dequantize_float.default: reference("dequantize_float"),
    optc.dequantize_codebook.default: reference("dequantize_codebook"),
    optc.quantize.default: reference("quantize"),
    optc.dequantize_activation.default: reference("dequantize_activation"),
}
"""Operator of the dialect -> the same in traceable ATen."""
DYNAMIC = optc.quantize_dynamic.default
"""Has two results, each of which becomes arithmetic of its own."""
_WEIGHTS = (optc.dequantize.default, optc.dequantize_float.default, optc.dequantize_codebook.default)


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
        sites = edited.calls(*ATEN_FORMS, DYNAMIC)
        misses = _pack_linears(edited) if self.packed else []
        left = len(edited.calls(*_WEIGHTS))
        for node in edited.calls(DYNAMIC):
            _inline_results(edited, node)
        for node in edited.calls(*ATEN_FORMS):
            inline_call(edited, node, ATEN_FORMS[node.target])
        if not sites:
            return PassResult(program, 0, 0)
        share_expressions(edited)  # positions and masks are the same in every layer
        drop_dead(edited)
        notes = (f"{left} weights are dequantized before each use",) if left else ()
        return PassResult(prune_contract(edited).changed(), len(sites), len(sites), tuple(misses), notes)


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


def _inline_results(program: Program, node: Node) -> None:
    """Spell out both results of `quantize_dynamic`, (codes, scale), where they are read."""
    x, form = node.args[0], str(node.kwargs["format"])
    for user in list(node.users):
        assert user.target is operator.getitem
        index = user.args[1]
        assert isinstance(index, int)

        def result(values: Tensor, index: int = index) -> Tensor:
            part = reference("quantize_dynamic")(values, format=form)[index]
            assert isinstance(part, Tensor)
            return part

        user.args = (x,)
        inline_call(program, user, result)
    program.graph.erase_node(node)
