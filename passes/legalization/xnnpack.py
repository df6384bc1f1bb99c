"""linear(x, dequantize(codes, scale))      ->  linear_dynamic(x, codes - middle, scale)
embedding(dequantize(codes, scale), ids)  ->  embedding(codes - middle, ids) * scale[ids]

XNNPACK multiplies codes of weights with activations that it rounds to int8 itself, token by token, with a zero point;
and it keeps scales of groups in bfloat16. Both move the numbers, so the pass is lossy and the gate sees what it costs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from optc.compiler.analysis.dataflow import value_of
from optc.compiler.analysis.head_layout import call_of
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import add_weight, replace_call
from optc.compiler.ops.library import makes_weight
from optc.compiler.rewriting.budget import Budget
from optc.compiler.rewriting.inlining import inline_call
from optc.compiler.rewriting.passes import Match, Miss, Pass, PassContext, PassResult, Rule, apply_rules
from optc.compiler.rewriting.weights import prune_contract, record_weight
from optc.passes.quantization.arithmetic.budgets import INT8_INPUTS

_optc, _aten = torch.ops.optc, torch.ops.aten
_STEP = 32
"""Columns that a group of XNNPACK's 4-bit product is a multiple of."""


@dataclass(frozen=True, kw_only=True)
class PackXnnpack(Pass):
    """linear(x, dequantize(codes, scale)) -> linear_dynamic(x, codes - middle, scale), lookups of codes of 8 bits by rows

    Attributes:
        bits: of the weights, 4 in groups or 8 with one scale per channel; the head's may be 8 in either case.
    """

    name: ClassVar[str] = "pack-xnnpack"
    lossy: ClassVar[bool] = True

    bits: int = 4

    def budget(self, before: Program) -> Budget:
        return INT8_INPUTS

    def run(self, program: Program, context: PassContext) -> PassResult:
        made: _Made = {}
        result = apply_rules(program, [_Product(self.bits, made), _Lookup(made)])
        if not result.matched:
            return result
        return PassResult(prune_contract(result.program), result.matched, result.candidates, result.misses)


_Made = dict[Node, tuple[Node, Node]]
"""Dequantization -> signed codes and scales, which all of its readers share."""


class _Product(Rule):
    """One linear over a quantized weight."""

    def __init__(self, bits: int, made: _Made) -> None:
        self.bits = bits
        self._made = made

    def match(self, program: Program, node: Node) -> Match | Miss | None:
        if node.op != "call_function" or node.target is not _aten.linear.default:
            return None
        weight = node.args[1]
        if not isinstance(weight, Node) or not makes_weight(weight.target):
            return None
        call = call_of(weight, _optc.dequantize.default)
        reason = "its weight is not made of integer codes" if call is None else self._obstacle(program, call)
        return Miss(node.name, reason) if reason else Match(node, {"weight": call})

    def _obstacle(self, program: Program, weight: Node) -> str | None:
        bits, columns = int(weight.kwargs["bits"]), int(value_of(weight).shape[1])
        group = int(weight.kwargs["group_size"]) or columns
        if bits not in (4, 8):
            return f"its weight has {bits} bits: there are products for 4 and 8"
        if bits not in (self.bits, 8):
            return f"its weight has {bits} bits, not {self.bits}"
        if weight.args[2] is not None:
            return "its weight has zero points: use symmetric codes"
        if bits == 8 and group != columns:
            return "its 8-bit weight has several scales per channel: use group size 0"
        if bits == 4 and group % _STEP:
            return f"its groups of {group} columns are not a multiple of {_STEP}"
        known = all(program.weight_of(item) is not None for item in weight.args[:2])
        return None if known else "its codes are computed"

    def rewrite(self, program: Program, match: Match) -> None:
        node, weight = match.node, match.found["weight"]
        bits, columns = int(weight.kwargs["bits"]), int(value_of(weight).shape[1])
        group = 0 if bits == 8 else int(weight.kwargs["group_size"]) or columns
        args = (node.args[0], *_packed(program, weight, self._made), (*node.args, None)[2])
        replace_call(program, node, _optc.linear_dynamic.default, args, {"bits": bits, "group_size": group})


class _Lookup(Rule):
    """Rows of a table whose codes of 8 bits have one scale each: ExecuTorch's portable kernels look codes up, too."""

    def __init__(self, made: _Made) -> None:
        self._made = made

    def match(self, program: Program, node: Node) -> Match | Miss | None:
        weight = call_of(node.args[0], _optc.dequantize.default) if node.target is _aten.embedding.default else None
        if weight is None:
            return None
        one_scale = int(weight.kwargs["group_size"]) in (0, int(value_of(weight).shape[1]))
        if int(weight.kwargs["bits"]) != 8 or not one_scale or weight.args[2] is not None:
            return Miss(node.name, "its table has no symmetric codes of 8 bits with a scale for each row")
        return Match(node, {"weight": weight})

    def rewrite(self, program: Program, match: Match) -> None:
        node = match.node
        node.args, node.kwargs = (*_packed(program, match.found["weight"], self._made), node.args[1]), {}
        inline_call(program, node, _rows)


def _rows(codes: Tensor, scale: Tensor, indices: Tensor) -> Tensor:
    return torch.nn.functional.embedding(indices, codes).float() * scale[indices][..., None]


def _packed(program: Program, weight: Node, made: _Made) -> tuple[Node, Node]:
    """Signed codes, and scales as XNNPACK keeps them, as weights."""
    if weight not in made:
        bits = int(weight.kwargs["bits"])
        name, scale_name = (program.weight_of(item) for item in weight.args[:2])
        assert name is not None
        assert scale_name is not None
        codes = (program.weight(name).detach().short() - 2 ** (bits - 1)).to(torch.int8)
        scale = program.weight(scale_name).detach().float()
        scale = scale.reshape(-1) if bits == 8 else scale.bfloat16().float()
        base, contract = name.removesuffix("_codes"), program.contract
        sources = contract.sources.get(name, (name,))
        record_weight(program, f"{base}_signed", sources, contract.quantization.get(name))
        record_weight(program, f"{base}_scales", sources, None)
        made[weight] = add_weight(program, f"{base}_signed", codes), add_weight(program, f"{base}_scales", scale)
    return made[weight]
