"""linear(x, W)  ->  linear(x, dequantize_mxfp4(codes, exponents)), codes in E2M1, blocks of 32 with powers of two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from optc.compiler.analysis.linears import Linear
from optc.compiler.formats.integer import check_finite_weight
from optc.compiler.ir.contract import WeightQuantization
from optc.compiler.ir.program import Program
from optc.compiler.ops.dialect.mxfp4 import BLOCK, quantize_mxfp4
from optc.compiler.rewriting.budget import Budget
from optc.compiler.rewriting.passes import Pass, PassContext, PassResult
from optc.passes.quantization.arithmetic.budgets import weight_budget
from optc.passes.quantization.arithmetic.groups import weight_label, weight_rows
from optc.passes.quantization.arithmetic.selection import (
    dequantized_before,
    place_codes,
    quantize_selected,
    read_instead,
    select_in_groups,
    weight_part,
)


@dataclass(frozen=True, kw_only=True)
class QuantizeMxfp4(Pass):
    """linear(x, W)  ->  linear(x, optc.dequantize_mxfp4(codes, exponents))

    4-bit floats in blocks of 32 along K, each under the power of two with the smaller error of the two that can be (see
    `optc.compiler.ops.dialect.mxfp4`). Inputs stay as they are. Which linears: as quantize-rtn.

    Attributes:
        ignore: patterns (`*.down_proj.*`) of weight names to leave alone.
        head: quantize the linear that makes the logits too.
    """

    name: ClassVar[str] = "quantize-mxfp4"
    lossy: ClassVar[bool] = True

    ignore: tuple[str, ...] = ()
    head: bool = False

    def budget(self, before: Program) -> Budget:
        return weight_budget(4)

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Quantize a clone of `program`.

        Raises:
            InputError: 32 does not divide a K (names the weight), or a weight is not finite.
        """
        return quantize_selected(program, select_in_groups(program, self.ignore, self.head, BLOCK), _quantize)


def _quantize(program: Program, site: Linear) -> None:
    weight = dequantized_before(program, site)
    if weight is None:
        source, rows = weight_label(program, site), weight_rows(program, site)
        check_finite_weight(*rows.aminmax(), where=source)
        codes, exponents = quantize_mxfp4(rows)
        entry = WeightQuantization(
            method="mxfp4", bits=4, group_size=BLOCK, symmetric=True, source=source, format="mxfp4"
        )
        weight = place_codes(program, site, codes, [weight_part(program, site, "scale", exponents)], entry)
    read_instead(program, site, weight)
