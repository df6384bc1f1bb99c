"""norm -> linear -> activation -> residual  ->  optc.fused_linear; norm -> residual, rotary -> attention  ->  one call"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import drop_dead
from optc.compiler.rewriting.passes import Pass, PassContext, PassResult, apply_rules
from optc.compiler.rewriting.weights import prune_contract
from optc.passes.fusion.decode_attention import RotaryAttention, take_factor, uncopied
from optc.passes.fusion.decode_experts import ChooseExperts, FusedExperts
from optc.passes.fusion.decode_linears import FusedLinear
from optc.passes.fusion.decode_residuals import FusedNorm, Regroup


@dataclass(frozen=True, kw_only=True)
class FuseDecode(Pass):
    """act(linear(norm(x), W, b)) [* up] + residual -> fused_linear; paged_attention_(rotary(q), ...) -> one call;
    norm(x) * factor + residual -> fused_norm; sum of share_e * down_e(act(up_e(x))) over experts e -> fused_experts

    What a decode step reads is its weights, and what it waits for are its kernels: a layer of five calls, each of which
    reads its weights once, is as few as attention and linears allow. Sites are found by dataflow: the norm in front of
    a linear, where nothing else reads it; bias, activation, product of two halves, and the residual behind it; and
    the rotation (and norm of each head) of the queries and keys of a paged attention. Norms and factors of rows that
    none of these takes in, with the residual behind, are calls of their own; so are the experts of a layer, of which only
    the chosen ones are read. A part that cannot be taken in stays as it is, and the reason is among the misses.
    `matched` counts the calls that result.
    """

    name: ClassVar[str] = "fuse-decode"

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Fuse in a clone of `program`."""
        linears, attention = FusedLinear(), RotaryAttention()
        grouped = apply_rules(program, [Regroup()]).program
        result = apply_rules(grouped, [linears, attention])
        experts = FusedExperts()
        rest = apply_rules(result.program, [ChooseExperts(), experts, FusedNorm()])
        matched = result.matched + rest.matched - experts.taken
        candidates = result.candidates + rest.candidates - experts.taken
        misses = (*result.misses, *linears.left, *attention.left, *rest.misses)
        if not matched:
            return PassResult(program, 0, candidates, misses)
        _spare_copies(rest.program)
        return PassResult(prune_contract(rest.program), matched, candidates, misses)


def _spare_copies(program: Program) -> None:
    """Let attention without a rotation read queries, keys and values where they are, and scale what it computes."""
    for node in program.calls(torch.ops.optc.paged_attention_.default):
        take_factor(node)
        tensors = [uncopied(item) for item in node.args[:3] if isinstance(item, Node)]
        node.args = (*tensors, *node.args[3:])
    drop_dead(program)
