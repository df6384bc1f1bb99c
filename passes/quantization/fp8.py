"""linear(x, W)  ->  linear(x, dequantize_float(codes, scale)), codes in float8 E4M3."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from optc.compiler.analysis.linears import Linear
from optc.compiler.formats.integer import check_finite_weight
from optc.compiler.ir.contract import WeightQuantization
from optc.compiler.ir.program import Program
from optc.compiler.ops.dialect.quantization import FORMATS
from optc.compiler.rewriting.budget import Budget
from optc.compiler.rewriting.passes import Pass, PassContext, PassResult
from optc.passes.quantization.arithmetic.budgets import FP8_WEIGHTS
from optc.passes.quantization.arithmetic.groups import shared_magnitudes, weight_label, weight_rows
from optc.passes.quantization.arithmetic.selection import (
    dequantized_before,
    place_codes,
    quantize_selected,
    read_instead,
    select_linears,
    weight_part,
)

Granularity = Literal["channel", "tensor", "input"]


@dataclass(frozen=True, kw_only=True)
class QuantizeFp8(Pass):
    """linear(x, W)  ->  linear(x, optc.dequantize_float(codes, scale))

    E4M3 of Micikevicius et al. 2022 (https://arxiv.org/abs/2209.05433): 3 bits of mantissa, largest 448, which the
    scale maps the largest weight to. Inputs stay as they are; `quantize-activations` with format=fp8 rounds them too.
    Which linears: as quantize-rtn.

    Attributes:
        granularity: one scale per output channel, one for the whole weight, or one for all weights that share an input,
            so that an engine may run them as one product.
        ignore: patterns (`*.down_proj.*`) of weight names to leave alone.
        head: quantize the linear that makes the logits too.
    """

    name: ClassVar[str] = "quantize-fp8"
    lossy: ClassVar[bool] = True

    granularity: Granularity = "channel"
    ignore: tuple[str, ...] = ()
    head: bool = False

    def budget(self, before: Program) -> Budget:
        return FP8_WEIGHTS

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Quantize a clone of `program`.

        Raises:
            InputError: a weight is not finite.
        """
        selection = select_linears(program, self.ignore, self.head)
        shared = shared_magnitudes(program, selection.chosen) if self.granularity == "input" else {}

        def quantize(edited: Program, site: Linear) -> None:
            self._quantize(edited, site, shared.get(weight_label(edited, site)))

        return quantize_selected(program, selection, quantize)

    def _quantize(self, program: Program, site: Linear, shared: float | None) -> None:
        weight = dequantized_before(program, site)
        if weight is None:
            source = weight_label(program, site)
            codes, scale = quantize_float(weight_rows(program, site), self.granularity, source, shared)
            entry = WeightQuantization(method="fp8", bits=8, group_size=0, symmetric=True, source=source, format="fp8")
            parts = [weight_part(program, site, "scale", scale)]
            weight = place_codes(program, site, codes, parts, entry)
        read_instead(program, site, weight)


def quantize_float(
    weight: Tensor, granularity: Granularity, where: str, shared: float | None = None
) -> tuple[Tensor, Tensor]:
    """(codes float8 E4M3 [N,K], scale [N,1] or [1,1] in the weight's dtype) of a weight [N,K].

    A channel of zeros gets scale 1. `shared` is the largest magnitude that granularity "input" scales by.

    Raises:
        InputError: the weight is not finite; `where` names it.
    """
    dtype, top = FORMATS["fp8"]
    values = weight.detach().float()
    largest = values.abs().amax(dim=1, keepdim=True)
    if granularity != "channel":
        largest = largest.amax(dim=0, keepdim=True)
    if shared is not None:
        largest = torch.full_like(largest, shared)
    check_finite_weight(largest, where=where)
    # Rounded to how it is kept before codes are chosen; a scale that rounds down clips the largest weight a little.
    least = torch.finfo(weight.dtype).smallest_normal
    scale = torch.where(largest > 0, (largest / top).clamp(min=least), 1.0).to(weight.dtype)
    return (values / scale.float()).clamp(-top, top).to(dtype), scale
