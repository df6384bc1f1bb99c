"""batch_norm(conv(x, W, b))  ->  conv(x, W * s, (b - mean) * s + shift)"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from optc.compiler.analysis.convolutions import CONVOLUTIONS, convolution_site
from optc.compiler.analysis.dataflow import aten, sole_user, value_of
from optc.compiler.analysis.linears import LINEARS, linear_site
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import add_weight, replace_call
from optc.compiler.rewriting.passes import Match, Miss, Pass, PassContext, PassResult, Rule, apply_rules
from optc.compiler.rewriting.weights import prune_contract, record_weight


@dataclass(frozen=True, kw_only=True)
class FoldBatchnorm(Pass):
    """batch_norm(conv(x, W, b))  ->  conv(x, W * s, (b - mean) * s + shift)

    With s = weight / sqrt(var + eps), of running statistics. Behind linears too. What only the norm reads is folded;
    numbers move by rounding, as the products are taken in float64.
    """

    name: ClassVar[str] = "fold-batchnorm"

    def run(self, program: Program, context: PassContext) -> PassResult:
        result = apply_rules(program, [_Norm()])
        if not result.matched:
            return result
        return PassResult(prune_contract(result.program), result.matched, result.candidates, result.misses)


class _Norm(Rule):
    """A norm of running statistics behind a product with a weight."""

    def match(self, program: Program, node: Node) -> Match | Miss | None:
        if node.target is not aten.batch_norm.default:
            return None
        x, *statistics = node.args[:5]
        if node.args[5] or None in statistics[2:]:
            return Miss(node.name, "it normalizes by the batch's own statistics")
        if any(item is not None and program.weight_of(item) is None for item in statistics):
            return Miss(node.name, "its statistics are computed, not weights")
        assert isinstance(x, Node)
        if x.target not in (*CONVOLUTIONS, *LINEARS):
            return Miss(node.name, f"its input is {x.target}, no convolution or linear")
        alone = sole_user(x) is node
        if not alone:
            return Miss(node.name, f"{x.name} is read by others too")
        held = convolution_site(program, x)
        linear = linear_site(program, x) if x.target in LINEARS else None
        if held is not None:
            return Match(node, {"product": x, "weight": held.weight, "bias": held.bias})
        if linear is None or linear.placeholder is not linear.weight or linear.transposed or value_of(x).dim() != 2:
            return Miss(node.name, f"{x.name} has no weight [N, ...] of its own")
        return Match(node, {"product": x, "weight": linear.weight, "bias": linear.bias})

    def rewrite(self, program: Program, match: Match) -> None:
        node, product, weight, bias = match.node, *(match.found[key] for key in ("product", "weight", "bias"))
        factor, mean, shift = _affine(program, node)
        values = _value(program, weight)
        folded = values * factor.reshape([-1] + [1] * (values.dim() - 1))
        offset = ((_value(program, bias) if bias is not None else 0.0) - mean) * factor + shift
        dtype = value_of(weight).dtype
        arguments = (
            product.args[0],
            _placed(program, weight, folded.to(dtype)),
            _placed(program, weight, offset.to(dtype), "folded_bias"),
            *product.args[3:],
        )
        replace_call(program, node, product.target, arguments, dict(product.kwargs))


def _affine(program: Program, node: Node) -> tuple[Tensor, Tensor, Tensor]:
    """(factor, mean, shift) in float64: the norm is (x - mean) * factor + shift."""
    weight, bias, mean, variance = (None if item is None else _value(program, item) for item in node.args[1:5])
    assert mean is not None
    assert variance is not None
    factor = (variance + float(node.args[7])).rsqrt() * (1.0 if weight is None else weight)
    return factor, mean, torch.zeros_like(mean) if bias is None else bias


def _value(program: Program, node: Node) -> Tensor:
    name = program.weight_of(node)
    assert name is not None
    return program.weight(name).detach().double()


def _placed(program: Program, weight: Node, value: Tensor, suffix: str = "folded") -> Node:
    """A new weight beside another, under a name of its own."""
    name = program.weight_of(weight)
    assert name is not None
    stem, number = f"{name}_{suffix}", 0
    while (free := stem if not number else f"{stem}{number}") in program.exported.state_dict:
        number += 1
    record_weight(program, free, program.contract.sources.get(name, (name,)))
    return add_weight(program, free, value.contiguous())
