"""optc operators  ->  ATen, and quantized linears  ->  optc.linear_nbits

What is left of the dialect has a C++ kernel (compiler/kernels/cpu): `optc.paged_attention_`, and `optc.linear_nbits` over
packed codes (see passes/legalization/inductor_linears.py). Torch's own packed int4 product is not used: it is no faster in
bfloat16, 25 times slower than the unquantized product in other types, and its layout is that of one instruction set.
What the packed product cannot take becomes arithmetic before each use.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from optc.compiler.ir.program import Program
from optc.compiler.rewriting.passes import Pass, PassContext, PassResult
from optc.passes.legalization.by_kernels import legalize
from optc.passes.legalization.inductor_linears import PackedProduct


@dataclass(frozen=True, kw_only=True)
class LegalizeInductor(Pass):
    """Everything in ATen but what a kernel takes; quantized linears as optc.linear_nbits.

    Attributes:
        packed: use the packed product where it fits.
    """

    name: ClassVar[str] = "legalize-inductor"
    packed: bool = True

    def run(self, program: Program, context: PassContext) -> PassResult:
        return legalize(program, "cpu", [PackedProduct()] if self.packed else [])
