"""linear(x, W)  ->  linear(x, dequantize_nvfp4(codes, block_scale, scale)), codes in E2M1, blocks of 16."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from optc.compiler.analysis.linears import Linear
from optc.compiler.ir.contract import WeightQuantization
from optc.compiler.ir.program import Program
from optc.compiler.ops.dialect.nvfp4 import BLOCK, scale_of
from optc.compiler.rewriting.budget import Budget
from optc.compiler.rewriting.passes import Pass, PassContext, PassResult
from optc.passes.quantization.arithmetic.budgets import weight_budget
from optc.passes.quantization.arithmetic.groups import shared_magnitudes, weight_label, weight_rows
from optc.passes.quantization.arithmetic.selection import (
    dequantized_before,
    place_codes,
    quantize_selected,
    read_instead,
    select_in_groups,
    weight_part,
)


@dataclass(frozen=True, kw_only=True)
class QuantizeNvfp4(Pass):
    """linear(x, W)  ->  linear(x, optc.dequantize_nvfp4(codes, block_scale, scale))

    4-bit floats in blocks of 16 along K, each with an E4M3 scale, under one float32 scale that maps the largest
    weight to the largest code and block scale (see `optc.compiler.ops.dialect.nvfp4`). Linears of one input share that scale,
    so that an engine may run them as one product. Rounds to nearest; inputs stay as they are, `quantize-inputs` with
    format=nvfp4 rounds them too. Which linears: as quantize-rtn.

    Attributes:
        ignore: patterns (`*.down_proj.*`) of weight names to leave alone.
        head: quantize the linear that makes the logits too.
    """

    name: ClassVar[str] = "quantize-nvfp4"
    lossy: ClassVar[bool] = True

    ignore: tuple[str, ...] = ()
    head: bool = False

    def budget(self, before: Program) -> Budget:
        return weight_budget(4)

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Quantize a clone of `program`.

        Raises:
            InputError: 16 does not divide a K (names the weight), or a weight is not finite.
        """
        selection = select_in_groups(program, self.ignore, self.head, BLOCK)
        largest = shared_magnitudes(program, selection.chosen)

        def quantize(edited: Program, site: Linear) -> None:
            self._quantize(edited, site, largest[weight_label(edited, site)])

        return quantize_selected(program, selection, quantize)

    def _quantize(self, program: Program, site: Linear, largest: float) -> None:
        weight = dequantized_before(program, site)
        if weight is None:
            source, rows = weight_label(program, site), weight_rows(program, site)
            scale = scale_of(torch.tensor([largest], device=rows.device))
            codes, blocks = torch.ops.optc.quantize_nvfp4(rows, scale)
            entry = WeightQuantization(
                method="nvfp4", bits=4, group_size=BLOCK, symmetric=True, source=source, format="nvfp4"
            )
            parts = [
                weight_part(program, site, "scale", blocks),
                weight_part(program, site, "global_scale", scale),
            ]
            weight = place_codes(program, site, codes, parts, entry)
        read_instead(program, site, weight)
