"""linear(x, dequantize(W))  ->  linear(dequantize_activation(quantize(x, scale)), dequantize(W))"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import Node

from optc.compiler.dataflow import peel, value_of
from optc.compiler.linears import Linear, linear_sites
from optc.compiler.ops.quantization import FORMATS
from optc.compiler.program import Program
from optc.compiler.rewriting import Miss, Pass, PassContext, PassResult
from optc.compiler.surgery import add_weight, drop_dead, insert_call
from optc.compiler.weights import record_weight
from optc.passes.quantize.ranges import calibration_tokens, largest_magnitudes
from optc.passes.quantize.stream import Stream
from optc.passes.quantize_activations import obstacle, record_activations

_optc = torch.ops.optc


@dataclass(frozen=True, kw_only=True)
class QuantizeStatic(Pass):
    """linear(x, dequantize(W))  ->  linear(dequantize_activation(quantize(x, scale)), dequantize(W))

    As quantize-activations, with one scale per input (per tensor) from the calibration text, for engines that have no
    dynamic quantization. What is larger than anything seen there is clipped. Linears of one input share its codes.
    Scales are numbers of the compute type.

    Attributes:
        format: "int8" for integer weights with one scale per channel and no zero point; "fp8" (E4M3) for fp8 weights.
    """

    name: ClassVar[str] = "quantize-static"
    lossy: ClassVar[bool] = True
    calibrated: ClassVar[bool] = True

    format: Literal["int8", "fp8"] = "int8"

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Quantize inputs in a clone of `program`.

        Raises:
            InputError: no calibration tokens, or an input that is not finite (its layer is named).
        """
        sites, misses = self._sites(program)
        if not sites:
            return PassResult(program, 0, len(misses), misses)
        scales = self._scales(program, sites, calibration_tokens(self.name, context), context)
        edited = program.clone()
        nodes = {node.name: node for node in edited.graph.nodes}
        made: dict[str, Node] = {}
        for site in linear_sites(edited):
            root = peel(site.input)
            if root.name not in scales or site.node.name not in {item.node.name for item in sites}:
                continue
            if root.name not in made:
                made[root.name] = self._rounded(edited, site, nodes[root.name], scales[root.name])
            site.node.replace_input_with(site.input, made[root.name])
            record_activations(edited, site, self.format)
        drop_dead(edited)
        return PassResult(edited.changed(), len(sites), len(sites) + len(misses), misses)

    def _sites(self, program: Program) -> tuple[list[Linear], tuple[Miss, ...]]:
        """Linears to be rounded, and why the others with quantized weights are not."""
        sites, misses = [], []
        for site in linear_sites(program):
            if site.placeholder is not None:
                continue
            reason = "its input is quantized already" if site.activations else obstacle(site, self.format)
            if reason:
                misses.append(Miss(site.node.name, reason))
            else:
                sites.append(site)
        return sites, tuple(misses)

    def _scales(
        self, program: Program, sites: list[Linear], tokens: Tensor, context: PassContext
    ) -> dict[str, Tensor]:
        """One scale [1] per input, by the node's name, in the type of the input."""
        stream, top = Stream(program, tokens), FORMATS[self.format][1]
        found: dict[str, Tensor] = {}
        roots = {peel(site.input): site for site in sites}
        order = {node: index for index, node in enumerate(program.graph.nodes)}
        with torch.no_grad():
            for number, root in enumerate(sorted(roots, key=lambda node: order[node])):
                if context.progress:
                    context.progress(number, len(roots), _label(program, roots[root]))
                stream.advance(root)
                where = f"input of {_label(program, roots[root])}"
                largest = largest_magnitudes(stream, root, where, ())
                scale = torch.where(largest > 0, largest / top, 1.0).reshape(1)
                found[root.name] = scale.to(value_of(root).dtype)
        return found

    def _rounded(self, program: Program, site: Linear, root: Node, scale: Tensor) -> Node:
        name = f"{_label(program, site)}_input_scale"
        record_weight(program, name, ())
        node = add_weight(program, name, scale)
        codes = insert_call(program, site.node, _optc.quantize.default, (root, node), {"format": self.format})
        knobs = {"dtype": value_of(root).dtype}
        return insert_call(program, site.node, _optc.dequantize_activation.default, (codes, node), knobs)


def _label(program: Program, site: Linear) -> str:
    """The name of the weight whose codes a linear reads."""
    name = program.weight_of(site.weight.args[0])
    assert name is not None, "the codes of a quantized weight are a weight"
    return name.removesuffix("_codes")
