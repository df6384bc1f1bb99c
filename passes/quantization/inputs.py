"""linear(x, dequantize(W))  ->  linear(dequantize_activation(quantize(x, scale), scale), dequantize(W))"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from optc.compiler.analysis.dataflow import value_of
from optc.compiler.analysis.linears import Linear, linear_site, linear_sites
from optc.compiler.calibration.examples import Examples
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import add_weight
from optc.compiler.ops.dialect.nvfp4 import scale_of
from optc.compiler.ops.dialect.quantization import FORMATS
from optc.compiler.rewriting.budget import Budget
from optc.compiler.rewriting.passes import Miss, Pass, PassContext, PassResult
from optc.compiler.rewriting.rounded_inputs import rounded_input
from optc.compiler.rewriting.weights import record_weight
from optc.passes.quantization.activations import obstacle, record_activations
from optc.passes.quantization.arithmetic.budgets import FP8_INPUTS, INT8_FIXED_INPUTS, NVFP4_INPUTS
from optc.passes.quantization.arithmetic.groups import Group, input_groups, input_label
from optc.passes.quantization.arithmetic.ranges import calibration_feed, largest_magnitudes
from optc.passes.quantization.arithmetic.stream import Stream


@dataclass(frozen=True, kw_only=True)
class QuantizeInputs(Pass):
    """linear(x, dequantize(W))  ->  linear(dequantize_activation(quantize(x, scale), scale), dequantize(W))

    Inputs of quantized linears are rounded by scales from the calibration text, one for all tokens: what is larger
    than anything seen there is clipped. No reduction over a token stands in front of the product, which servers on
    GPUs like; `quantize-activations` takes the scales from the token at hand. Runs behind the rounding of weights,
    whose linears it calibrates on. Linears of one input share its codes.

    Attributes:
        format: "fp8" (E4M3) for fp8 weights, "int8" for symmetric 8-bit ones with one scale per channel, "nvfp4" for
            nvfp4 ones: the scale above those of the blocks of 16, which are the values' own.
        own_type: scales are numbers of the inputs' type rather than float32 ones, as QuantizeLinear asks for.
    """

    name: ClassVar[str] = "quantize-inputs"
    lossy: ClassVar[bool] = True
    calibrated: ClassVar[bool] = True

    format: Literal["fp8", "int8", "nvfp4"] = "fp8"
    own_type: bool = False

    def budget(self, before: Program) -> Budget:
        return {"fp8": FP8_INPUTS, "int8": INT8_FIXED_INPUTS, "nvfp4": NVFP4_INPUTS}[self.format]

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Quantize inputs in a clone of `program`.

        Raises:
            InputError: no calibration tokens, or activations that are not finite (the layer is named).
        """
        sites = [site for site in linear_sites(program) if site.placeholder is None]
        misses = [Miss(site.node.name, reason) for site in sites if (reason := self._obstacle(site))]
        groups = input_groups([site for site in sites if not self._obstacle(site)])
        if not groups:
            return PassResult(program, 0, len(sites), tuple(misses))
        scales = self._scales(program, groups, calibration_feed(self.name, context), context)
        edited = program.clone()
        nodes = {node.name: node for node in edited.graph.nodes}
        for group, scale in zip(groups, scales, strict=True):
            held = [linear_site(edited, nodes[site.node.name]) for site in group.sites]
            self._round(edited, [site for site in held if site is not None], scale)
        matched = sum(len(group.sites) for group in groups)
        return PassResult(edited.changed(), matched, len(sites), tuple(misses))

    def _obstacle(self, site: Linear) -> str | None:
        return "its input is already quantized" if site.activations else obstacle(site, self.format)

    def _scales(
        self, program: Program, groups: list[Group], tokens: Tensor | Examples, context: PassContext
    ) -> list[Tensor]:
        """One scale [1] per group."""
        stream, found = Stream(program, tokens), []
        with torch.no_grad():
            for number, group in enumerate(groups):
                label = input_label(program, group)
                if context.progress:
                    context.progress(number, len(groups), label)
                stream.advance(group.root)
                largest = largest_magnitudes(stream, group.root, f"input of {label}", ()).reshape(1)
                if self.format == "nvfp4":
                    scale = scale_of(largest)
                else:
                    scale = torch.where(largest > 0, largest / FORMATS[self.format][1], 1.0)
                found.append(scale.to(value_of(group.root).dtype) if self.own_type else scale)
        return found

    def _round(self, program: Program, sites: list[Linear], scale: Tensor) -> None:
        """Let the linears of one input read its codes; views of the input stay in front of them."""
        codes = program.weight_of(sites[0].weight.args[0])
        assert codes is not None
        name = f"{codes.removesuffix('_codes')}_input_scale"
        record_weight(program, name, program.contract.sources.get(codes, ()))
        node = add_weight(program, name, scale)
        made = {
            x: rounded_input(program, site.node, x, self.format, node)
            for x, site in {site.input: site for site in reversed(sites)}.items()
        }
        for site in sites:
            site.node.replace_input_with(site.input, made[site.input])
            record_activations(program, site, self.format)
