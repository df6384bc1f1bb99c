"""optc operators  ->  ATen, quantized linears  ->  optc.linear_nbits, linears of paged programs  ->  optc.linear_few,
lookups of quantized tables  ->  rows of packed codes

What is left of the dialect has a C++ kernel (compiler/kernels/cpu): `optc.paged_attention_`, and `optc.linear_nbits` over
packed codes (see passes/legalization/inductor_linears.py). Torch's own packed int4 product is not used: it is no faster in
bfloat16, 25 times slower than the unquantized product in other types, and its layout is that of one instruction set.
What the packed product cannot take becomes arithmetic before each use.

Steps of a paged program have as many rows as requests run, and each has drafted tokens beside the last one. BLAS multiplies
up to some ten rows one by one, or packs the weight first: products that read the weight once take their place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from optc.compiler.analysis.dataflow import aten, value_of
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import replace_call
from optc.compiler.rewriting.passes import Match, Pass, PassContext, PassResult, Rule, apply_rules
from optc.passes.legalization.by_kernels import legalize
from optc.passes.legalization.inductor_linears import PackedCodes, PackedLookup, PackedProduct


@dataclass(frozen=True, kw_only=True)
class LegalizeInductor(Pass):
    """Everything in ATen but what a kernel takes; quantized linears as optc.linear_nbits, those of paged programs in float32
    as optc.linear_few; lookups of quantized tables as rows of packed codes.

    Attributes:
        packed: use packed codes where they fit.
    """

    name: ClassVar[str] = "legalize-inductor"
    packed: bool = True

    def run(self, program: Program, context: PassContext) -> PassResult:
        codes = PackedCodes()
        found = legalize(program, "cpu", [PackedProduct(codes), PackedLookup(codes)] if self.packed else [])
        if program.contract.kv_cache.kind != "paged":
            return found
        few = apply_rules(found.program, [FewRows()])
        sites = (found.matched + few.matched, found.candidates + few.candidates)
        return PassResult(few.program, *sites, found.misses, found.notes)


class FewRows(Rule):
    """linear(x, weight, bias) in float32  ->  linear_few"""

    def match(self, program: Program, node: Node) -> Match | None:
        if node.target is not aten.linear.default:
            return None
        x, weight = node.args[:2]
        held = isinstance(weight, Node) and program.weight_of(weight) is not None
        return Match(node) if held and {value_of(x).dtype, value_of(weight).dtype} == {torch.float32} else None

    def rewrite(self, program: Program, match: Match) -> None:
        x, weight, bias = (*match.node.args, None)[:3]
        replace_call(program, match.node, torch.ops.optc.linear_few.default, (x, weight, bias))
