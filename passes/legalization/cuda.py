"""optc operators  ->  ATen, and what CUDA kernels take

What is left of the dialect has a kernel (compiler/kernels/cuda): `optc.fused_linear`, over packed codes where weights are
quantized (see passes/legalization/cuda_linears.py), and paged attention. What no kernel takes becomes ATen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from optc.compiler.ir.program import Program
from optc.compiler.rewriting.passes import Pass, PassContext, PassResult
from optc.passes.legalization.by_kernels import legalize
from optc.passes.legalization.cuda_linears import PackedLinear


@dataclass(frozen=True, kw_only=True)
class LegalizeCuda(Pass):
    """Everything in ATen but what a CUDA kernel takes; quantized weights of fused linears packed."""

    name: ClassVar[str] = "legalize-cuda"

    def run(self, program: Program, context: PassContext) -> PassResult:
        return legalize(program, "cuda", [PackedLinear()])
