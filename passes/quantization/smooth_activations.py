"""quantize-activations of the inputs that 8 bits can hold, measured on the calibration text"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from optc.compiler.analysis.linears import linear_sites
from optc.compiler.diagnostics import UsageError
from optc.compiler.ir.program import Program
from optc.compiler.ops.dialect.quantization import quantize_dynamic
from optc.compiler.rewriting.budget import Budget
from optc.compiler.rewriting.passes import Pass, PassContext, PassResult, apply_rules
from optc.passes.quantization.activations import RoundInput, obstacle
from optc.passes.quantization.arithmetic.budgets import INT8_INPUTS
from optc.passes.quantization.arithmetic.groups import Group, input_groups, input_label, rows
from optc.passes.quantization.arithmetic.ranges import calibration_feed, check_finite
from optc.passes.quantization.arithmetic.stream import Stream


@dataclass(frozen=True, kw_only=True)
class QuantizeSmoothActivations(Pass):
    """linear(x, dequantize(W))  ->  linear(dequantize_activation(*quantize_dynamic(x)), dequantize(W)) where x is smooth

    `quantize-activations` with int8, but inputs whose tokens have entries far above the others keep their type: a
    scale per token then spends its codes on those few. Their linears are W8A16 among W8A8 ones, which engines that
    take a scheme for each linear can load (Dettmers et al. 2022, https://arxiv.org/abs/2208.07339, keep columns so;
    here it is whole inputs). For engines that run it, `rotate-inputs` in front of `quantize-activations` is better.

    Attributes:
        largest_error: an input is rounded when the root mean square of what rounding changes is at most this share
            of the root mean square of its values. Normally distributed values of a thousand channels lose 0.009.
        samples: calibration sequences that are read, at most; 0 is all.
    """

    name: ClassVar[str] = "quantize-smooth-activations"
    lossy: ClassVar[bool] = True
    calibrated: ClassVar[bool] = True

    largest_error: float = 0.02
    samples: int = 32

    def __post_init__(self) -> None:
        if not 0 < self.largest_error <= 1:
            raise UsageError(
                f"largest error {self.largest_error} is not a share of the inputs' size",
                remedy="use a number above 0 and up to 1, such as 0.02",
            )

    def budget(self, before: Program) -> Budget:
        return INT8_INPUTS

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Round inputs in a clone of `program`; one that loses too much is a miss with what it would lose.

        Raises:
            InputError: no calibration tokens, or activations that are not finite (the layer is named).
        """
        sites = [site for site in linear_sites(program) if site.placeholder is None]
        groups = input_groups([site for site in sites if not site.activations and not obstacle(site, "int8")])
        stream = Stream(program, calibration_feed(self.name, context)[: self.samples or None])
        kept: dict[str, str] = {}
        with torch.no_grad():
            for number, group in enumerate(groups):
                label = input_label(program, group)
                if context.progress:
                    context.progress(number, len(groups), label)
                error = _lost(stream, group, label)
                if error > self.largest_error:
                    reason = (
                        f"rounding its input to 8 bits would change it by {error:.1%}, above {self.largest_error:.1%}"
                    )
                    kept |= {site.node.name: reason for site in group.sites}
        return apply_rules(program, [RoundInput("int8", kept)])


def _lost(stream: Stream, group: Group, label: str) -> float:
    """What rounding to int8 with a scale per token changes of a group's input, over its size, both root mean squares."""
    stream.advance(group.root)
    changed = size = torch.zeros((), dtype=torch.float64)
    for x in rows(stream, group.root):
        codes, scale = quantize_dynamic(x, format="int8")
        changed = changed + (codes * scale - x).double().square().sum().cpu()
        size = size + x.double().square().sum().cpu()
    check_finite(size, f"input of {label}")
    return float((changed / size.clamp_min(torch.finfo(size.dtype).tiny)).sqrt())
