"""Mixtures of experts: each token goes through those that it chose, in place of all."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.fx import Node

from optc.compiler.analysis.dataflow import aten, peel, value_of
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import replace_call
from optc.compiler.rewriting.passes import Match, Pass, PassContext, PassResult, Rule, apply_rules
from optc.compiler.rewriting.weights import prune_contract
from optc.passes.fusion.decode_experts import Expert, Products, stacked, summed_experts

_LINEAR = aten.linear.default
_ACTIVATIONS = {aten.silu.default: "silu", aten.relu.default: "relu"}


def has_experts(program: Program) -> bool:
    """Whether a program computes one product of weights that lie in a stack."""
    return any(stacked(program, node.args[1]) is not None for node in program.calls(_LINEAR))


@dataclass(frozen=True, kw_only=True)
class GroupExperts(Pass):
    """sum over experts e of share_e * down_e(act(gate_e(x)) * up_e(x))  ->  optc.fused_experts

    A mixture is captured as every expert on every token, whose shapes do not depend on data. The operator takes the
    tokens of each expert together, so that a token costs what its own experts cost, and weights of experts that none
    chose are not read. For float32 and gates of two halves; quantized experts, and others, stay as they are.
    """

    name: ClassVar[str] = "group-experts"

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Group in a clone of `program`."""
        result = apply_rules(program, [_Experts()])
        if not result.matched:
            return result
        return PassResult(prune_contract(result.program), result.matched, result.candidates, result.misses)


class _Experts(Rule):
    def match(self, program: Program, node: Node) -> Match | None:
        experts = summed_experts(program, node, _plain_products)
        if not experts or value_of(experts[0].x).dtype is not torch.float32:
            return None
        return Match(node, {"expert": experts[0]})

    def rewrite(self, program: Program, match: Match) -> None:
        expert: Expert = match.found["expert"]
        arguments = (expert.x, expert.up, expert.down, expert.indices, expert.weights, None)
        replace_call(program, match.node, torch.ops.optc.fused_experts.default, arguments, dict(expert.options))


def _plain_products(program: Program, product: Node) -> Products | None:
    down = _of_stack(program, product)
    if down is None:
        return None
    gated = peel(product.args[0])
    if gated.target is not aten.mul.Tensor or not all(isinstance(item, Node) for item in gated.args):
        return None
    activated, other = (peel(item) for item in gated.args)
    name = _activation(activated)
    if name is None:
        return None
    first, second = _half(peel(activated.args[0])), _half(other)
    if first is None or second is None or (first[1], second[1]) != (0, 1) or first[0] is not second[0]:
        return None
    both = peel(first[0])
    up = _of_stack(program, both)
    if up is None or up[1] != down[1]:
        return None
    return up[1], peel(both.args[0]), up[0], down[0], {"activation": name, "gated": True}


def _of_stack(program: Program, linear: Node) -> tuple[Node, int] | None:
    """The weight [E, N, K] and the place in it of a linear without a bias."""
    if linear.target is not _LINEAR or any(item is not None for item in linear.args[2:]):
        return None
    return stacked(program, linear.args[1])


def _activation(node: Node) -> str | None:
    if node.target is aten.gelu.default:
        return "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu"
    name: str | None = _ACTIVATIONS.get(node.target)
    return name


def _half(node: Node) -> tuple[Node, int] | None:
    """What a tensor is the first (0) or second (1) half of, along its last axis."""
    if node.target is not operator.getitem:
        return None
    whole, place = node.args
    if not isinstance(whole, Node) or whole.target is not aten.chunk.default or not isinstance(place, int):
        return None
    source, *rest = whole.args
    axes: Any = value_of(source).dim() if isinstance(source, Node) else 0
    return (source, place) if rest in ([2, -1], [2, axes - 1]) and isinstance(source, Node) else None
