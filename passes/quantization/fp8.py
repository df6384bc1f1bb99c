"""linear(x, W)  ->  linear(x, dequantize_float(codes, scale)), codes in float8 E4M3."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from optc.compiler.analysis.linears import Linear
from optc.compiler.diagnostics import InputError
from optc.compiler.formats.integer import check_finite_weight
from optc.compiler.ir.contract import WeightQuantization
from optc.compiler.ir.program import Program
from optc.compiler.ops.dialect.quantization import FORMATS, FP8_BLOCK
from optc.compiler.rewriting.budget import Budget
from optc.compiler.rewriting.passes import Pass, PassContext, PassResult
from optc.passes.quantization.arithmetic.budgets import FP8_WEIGHTS
from optc.passes.quantization.arithmetic.groups import shared_magnitudes, weight_label, weight_rows
from optc.passes.quantization.arithmetic.selection import (
    dequantized_before,
    place_codes,
    quantize_selected,
    read_instead,
    select_in_groups,
    select_linears,
    weight_part,
)

Granularity = Literal["channel", "tensor", "input", "block"]


@dataclass(frozen=True, kw_only=True)
class QuantizeFp8(Pass):
    """linear(x, W)  ->  linear(x, optc.dequantize_float(codes, scale))

    E4M3 of Micikevicius et al. 2022 (https://arxiv.org/abs/2209.05433): 3 bits of mantissa, largest 448, which the
    scale maps the largest weight to. Inputs stay as they are; `quantize-activations` with format=fp8 rounds them too.
    Which linears: as quantize-rtn.

    Attributes:
        granularity: one scale per output channel, one for the whole weight, or one for all weights that share an input,
            so that an engine may run them as one product; or one for each block of 128 x 128 (DeepSeek-V3,
            https://arxiv.org/abs/2412.19437), which is kept once for each row of it.
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
            InputError: a weight is not finite, or 128 does not divide its N and K and blocks are wanted.
        """
        if self.granularity == "block":
            selection = select_in_groups(program, self.ignore, self.head, FP8_BLOCK)
            _check_rows(program, selection.chosen)
        else:
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
            entry = WeightQuantization(
                method="fp8", bits=8, group_size=self._columns, symmetric=True, source=source, format="fp8"
            )
            parts = [weight_part(program, site, "scale", scale)]
            weight = place_codes(program, site, codes, parts, entry)
        read_instead(program, site, weight)

    @property
    def _columns(self) -> int:
        """That share a scale; 0 are all of a row."""
        return FP8_BLOCK if self.granularity == "block" else 0


def _check_rows(program: Program, chosen: Sequence[Linear]) -> None:
    """Refuse weights with rows beside the last whole block: an engine merges q, k and v block by block.

    Raises:
        InputError: names the first.
    """
    for site in chosen:
        if site.rows % FP8_BLOCK:
            raise InputError(
                f"blocks of {FP8_BLOCK} rows do not divide every weight",
                where=weight_label(program, site),
                why=f"it has N = {site.rows}",
                remedy="use --quant fp8, one scale per row, or leave this weight out: --ignore",
            )


def quantize_float(
    weight: Tensor, granularity: Granularity, where: str, shared: float | None = None
) -> tuple[Tensor, Tensor]:
    """(codes float8 E4M3 [N,K], scale [N,1], [1,1] or, of blocks, [N,K/128] in the weight's dtype) of a weight [N,K].

    A channel of zeros gets scale 1. `shared` is the largest magnitude that granularity "input" scales by.

    Raises:
        InputError: the weight is not finite; `where` names it.
    """
    dtype, top = FORMATS["fp8"]
    values = weight.detach().float()
    if granularity == "block":
        groups = values.unflatten(1, (-1, FP8_BLOCK)).abs().amax(dim=2)
        largest = groups.unflatten(0, (-1, FP8_BLOCK)).amax(dim=1).repeat_interleave(FP8_BLOCK, dim=0)
    else:
        largest = values.abs().amax(dim=1, keepdim=True)
    if granularity in ("tensor", "input"):
        largest = largest.amax(dim=0, keepdim=True)
    if shared is not None:
        largest = torch.full_like(largest, shared)
    check_finite_weight(largest, where=where)
    # Rounded to how it is kept before codes are chosen; a scale that rounds down clips the largest weight a little.
    least = torch.finfo(weight.dtype).smallest_normal
    scale = torch.where(largest > 0, (largest / top).clamp(min=least), 1.0).to(weight.dtype)
    spread = scale.float().repeat_interleave(FP8_BLOCK, dim=1) if granularity == "block" else scale.float()
    return (values / spread).clamp(-top, top).to(dtype), scale
