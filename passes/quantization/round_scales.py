"""dequantize(codes, scale, zero)  ->  dequantize(codes, scale rounded to float16, zero)"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from optc.compiler.analysis.linears import weight_calls
from optc.compiler.diagnostics import InputError
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import set_weight
from optc.compiler.rewriting.budget import Budget
from optc.compiler.rewriting.passes import Pass, PassContext, PassResult
from optc.passes.quantization.arithmetic.budgets import FLOAT16_SCALES
from optc.passes.quantization.arithmetic.grid import storable


@dataclass(frozen=True, kw_only=True)
class RoundScales(Pass):
    """dequantize(codes, scale, zero)  ->  dequantize(codes, scale rounded to float16, zero)

    The AWQ and GPTQ layouts keep scales in float16. Rounding them in the program makes what the gate sees the same as
    what is written. Scales keep the program's type; those that are float16 numbers already are left alone.

    Attributes:
        strict: refuse scales beyond float16's range; else those stay as they are, and take 32 bits.
    """

    name: ClassVar[str] = "round-scales"
    lossy: ClassVar[bool] = True

    strict: bool = True

    def budget(self, before: Program) -> Budget:
        return FLOAT16_SCALES

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Round the scales of a clone of `program`.

        Raises:
            InputError: a scale beyond what float16 holds, or so small that it would become 0; names the weight.
        """
        edited, rounded = program.clone(), set()
        names = {_scale_name(program, node) for node in weight_calls(program)}
        for name in sorted(names):
            scale = program.weight(name).detach()
            half = scale.to(torch.float16) if self.strict else storable(scale.float())
            if self.strict and not (bool(torch.isfinite(half).all()) and bool((half != 0).all())):
                raise InputError(
                    "a scale does not fit float16",
                    where=name,
                    why=f"scales from {float(scale.min()):.3g} to {float(scale.max()):.3g}; float16 holds 6e-8 to 65504",
                    remedy="use --layout compressed-tensors, which keeps scales in the compute type",
                )
            if not torch.equal(half.to(scale.dtype), scale):
                set_weight(edited, name, half.to(scale.dtype))
                rounded.add(name)
        if not rounded:
            return PassResult(program, 0, len(names))
        return PassResult(edited.changed(), len(rounded), len(names))


def _scale_name(program: Program, node: Node) -> str:
    name = program.weight_of(node.args[1])
    assert name is not None, f"{node.name} has a computed scale"
    return name
