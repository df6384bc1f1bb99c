"""norm -> linear -> activation -> residual  ->  optc.fused_linear; rotary -> attention  ->  one call"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import drop_dead
from optc.compiler.rewriting.passes import Pass, PassContext, PassResult, apply_rules
from optc.compiler.rewriting.weights import prune_contract
from optc.passes.fusion.decode_attention import RotaryAttention, uncopied
from optc.passes.fusion.decode_linears import FusedLinear


@dataclass(frozen=True, kw_only=True)
class FuseDecode(Pass):
    """act(linear(norm(x), W, b)) [* up] + residual -> fused_linear; paged_attention_(rotary(q), ...) -> one call

    What a decode step reads is its weights, and what it waits for are its kernels: a layer of five calls, each of which
    reads its weights once, is as few as attention and linears allow. Sites are found by dataflow: the norm in front of
    a linear, where nothing else reads it; bias, activation, product of two halves, and the residual behind it; and
    the rotation (and norm of each head) of the queries and keys of a paged attention. A part that cannot be taken in
    stays as it is, and the reason is among the misses. `matched` counts the calls that result.
    """

    name: ClassVar[str] = "fuse-decode"

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Fuse in a clone of `program`."""
        linears, attention = FusedLinear(), RotaryAttention()
        result = apply_rules(program, [linears, attention])
        if not result.matched:
            return result
        _spare_copies(result.program)
        misses = (*result.misses, *linears.left, *attention.left)
        return dataclasses.replace(result, program=prune_contract(result.program), misses=misses)


def _spare_copies(program: Program) -> None:
    """Let attention without a rotation read queries, keys and values where they are."""
    for node in program.calls(torch.ops.optc.paged_attention_.default):
        tensors = [uncopied(item) for item in node.args[:3] if isinstance(item, Node)]
        node.args = (*tensors, *node.args[3:])
    drop_dead(program)
