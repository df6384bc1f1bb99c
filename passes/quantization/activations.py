"""linear(x, dequantize(W))  ->  linear(dequantize_activation(*quantize_dynamic(x)), dequantize(W))"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal

import msgspec
import torch
from torch.fx import Node

from optc.compiler.analysis.dataflow import peel
from optc.compiler.analysis.linears import Linear, linear_site
from optc.compiler.ir.program import Program
from optc.compiler.ops.dialect.quantization import FP8_BLOCK
from optc.compiler.rewriting.budget import Budget
from optc.compiler.rewriting.passes import Match, Miss, Pass, PassContext, PassResult, Rule, apply_rules
from optc.compiler.rewriting.rounded_inputs import rounded_input
from optc.passes.quantization.arithmetic.budgets import FP8_INPUTS, INT8_INPUTS

_optc = torch.ops.optc
DynamicFormat = Literal["int8", "fp8", "fp8-128"]


@dataclass(frozen=True, kw_only=True)
class QuantizeActivations(Pass):
    """linear(x, dequantize(W))  ->  linear(dequantize_activation(*quantize_dynamic(x)), dequantize(W))

    8-bit inputs for linears whose weights have 8 bits already, so that the product of codes can be taken and
    scaled once per token and channel: W8A8 is `quantize-rtn(bits=8, group_size=0)`, or any other rounding, and
    this pass. Scales are those of the token at hand (max|x| / 127, or / 448). Linears of one input share its codes.

    Attributes:
        format: "int8" for integer weights with one scale per channel and no zero point; "fp8" (E4M3) for fp8
            weights with one scale per channel or for the whole weight, and for 4-bit integers without zero points;
            "fp8-128", a scale for each 128 neighbours of a token, for fp8 weights in groups of 128.
    """

    name: ClassVar[str] = "quantize-activations"
    lossy: ClassVar[bool] = True

    format: DynamicFormat = "int8"

    def budget(self, before: Program) -> Budget:
        return INT8_INPUTS if self.format == "int8" else FP8_INPUTS

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Quantize inputs in a clone of `program`."""
        return apply_rules(program, [RoundInput(self.format)])


class RoundInput(Rule):
    """The input of one linear.

    Args:
        kept: by the name of a linear's node: why its input stays as it is.
    """

    def __init__(self, format: DynamicFormat, kept: Mapping[str, str] = MappingProxyType({})) -> None:
        self.format: DynamicFormat = format
        self._kept = kept
        self._made: dict[Node, Node] = {}

    def match(self, program: Program, node: Node) -> Match | Miss | None:
        site = linear_site(program, node)
        if site is None or site.placeholder is not None:
            return None
        reason = "its input is already quantized" if site.activations else obstacle(site, self.format)
        reason = reason or self._kept.get(node.name)
        return Miss(node.name, reason) if reason else Match(node, {"site": site})

    def rewrite(self, program: Program, match: Match) -> None:
        site: Linear = match.found["site"]
        root = peel(site.input)
        if root not in self._made:
            self._made[root] = rounded_input(program, site.node, root, self.format)
        site.node.replace_input_with(site.input, self._made[root])
        record_activations(program, site, self.format)


def obstacle(site: Linear, format: str) -> str | None:
    """Why the product of a quantized weight with inputs in a format cannot be one of codes, or None."""
    call = site.weight
    if format == "nvfp4":
        fits = call.target is _optc.dequantize_nvfp4.default
        return None if fits else "its weight has no nvfp4 codes: see quantize-nvfp4"
    if format == "fp8" and call.target is _optc.dequantize.default and call.kwargs["bits"] == 4:
        return "its weight has zero points: use symmetric codes" if call.args[2] is not None else None
    if format in ("fp8", "fp8-128"):
        if call.target is not _optc.dequantize_float.default:
            return "its weight has no fp8 codes: see quantize-fp8"
        size = FP8_BLOCK if format == "fp8-128" else 0
        found = int(call.kwargs.get("group_size", 0))
        return None if found == size else f"its weight has groups of {found}, and {format} inputs are for {size}"
    if call.target is not _optc.dequantize.default or call.kwargs["bits"] != 8:
        return "its weight has no 8-bit integer codes"
    if call.kwargs["group_size"] not in (0, site.columns):
        return "its weight has several scales per channel: use group size 0"
    if call.args[2] is not None:
        return "its weight has zero points: use symmetric codes"
    return None


def record_activations(program: Program, site: Linear, format: DynamicFormat | Literal["nvfp4"]) -> None:
    """Note in the contract what the input of a quantized linear is rounded to."""
    name = program.weight_of(site.weight.args[0])
    table = program.contract.quantization
    if name in table:
        entry = msgspec.structs.replace(table[name], activations=format)
        program.contract = msgspec.structs.replace(program.contract, quantization={**table, name: entry})
