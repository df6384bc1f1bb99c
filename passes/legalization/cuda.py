"""optc operators  ->  ATen, and what CUDA kernels take

    where(condition, x, number)  ->  masked_fill(x, ~condition, number)

What is left of the dialect has a kernel (compiler/kernels/cuda): `optc.fused_linear` and `optc.packed_embedding`, over
packed codes where weights are quantized (see passes/legalization/cuda_linears.py), paged attention, and rows of other
embeddings and in front of the head (cuda_rows.py). What no kernel takes becomes ATen. A call of ATen that copies a number
from the host cannot be captured in a CUDA graph, and is spelled differently.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from optc.compiler.analysis.decode_launches import decode_launches
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import insert_call, replace_call
from optc.compiler.rewriting.passes import Match, Pass, PassContext, PassResult, Rule, apply_rules
from optc.passes.legalization.by_kernels import legalize
from optc.passes.legalization.cuda_linears import PackedLinear, PackedLookup, PackedWeights
from optc.passes.legalization.cuda_rows import SelectRows

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class LegalizeCuda(Pass):
    """Everything in ATen but what a CUDA kernel takes; quantized weights packed; nothing that a CUDA graph cannot hold.

    The notes of a paged program say what its decode step computes.
    """

    name: ClassVar[str] = "legalize-cuda"

    def run(self, program: Program, context: PassContext) -> PassResult:
        filled, weights = apply_rules(program, [_FillWhere()]), PackedWeights()
        packed = legalize(filled.program, "cuda", [PackedLinear(weights), PackedLookup(weights)])
        rows = apply_rules(packed.program, [SelectRows()])
        parts = (filled, packed, rows)
        notes = packed.notes
        if program.contract.kv_cache.kind == "paged":
            notes = (*notes, str(decode_launches(rows.program)))
        return PassResult(
            rows.program,
            sum(part.matched for part in parts),
            sum(part.candidates for part in parts),
            (*packed.misses, *rows.misses),
            notes,
        )


class _FillWhere(Rule):
    """where(condition, x, number), whose number would be copied to the device."""

    def match(self, program: Program, node: Node) -> Match | None:
        return Match(node) if node.target is aten.where.ScalarOther else None

    def rewrite(self, program: Program, match: Match) -> None:
        condition, x, number = match.node.args
        inverse = insert_call(program, match.node, aten.logical_not.default, (condition,))
        replace_call(program, match.node, aten.masked_fill.Scalar, (x, inverse, number))
