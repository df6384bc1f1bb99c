"""linear(x, W)  ->  linear(x, dequantize(codes, scale, zero)), codes by rounding to nearest on the range of least error."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from optc.compiler.analysis.linears import Linear
from optc.compiler.diagnostics import InputError
from optc.compiler.formats.group_sizes import GroupSize, check_bits, check_group_size, check_sizes
from optc.compiler.formats.integer import check_finite_weight, quantize_groups
from optc.compiler.ir.contract import WeightQuantization
from optc.compiler.ir.program import Program
from optc.compiler.rewriting.budget import Budget
from optc.compiler.rewriting.passes import Pass, PassContext, PassResult
from optc.passes.quantization.arithmetic.budgets import weight_budget
from optc.passes.quantization.arithmetic.grid import search
from optc.passes.quantization.arithmetic.groups import weight_label, weight_rows
from optc.passes.quantization.arithmetic.selection import (
    quantize_selected,
    replace_weight,
    select_in_groups,
    weight_name,
)

_STEPS = 10
_LEAST = {4: 0.65, 3: 0.5, 2: 0.3}
"""Bits -> the smallest share of the full range that is tried. On weights of trained models ten shares from 1 down to it
come within 1 % of the squared error of forty."""


@dataclass(frozen=True, kw_only=True)
class QuantizeRtn(Pass):
    """linear(x, W)  ->  linear(x, optc.dequantize(codes, scale, zero, bits=, group_size=))

    Weights whose every reader is a linear are quantized, stacked experts one by one. Left alone: the
    linear that makes the logits (its errors reach the output undamped), the routers of experts (a
    changed choice is no small error), weights that an embedding reads too.

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size: neighbours along K that share a scale; 0 is a whole row; None takes the largest of
            128, 64 and 32 that divides the K of every quantized linear. Of several each weight gets the first that
            divides its K, and one that none divides is left alone.
        symmetric: no zero point.
        ranges: "searched", of 2, 3 and 4 bits: the range of each group is shrunk, and its values all used, to where
            the squared error of its weights is least; nothing is gained at 8 bits. "full": the range reaches the
            largest weight, and symmetric codes leave their lowest value unused (Jacob et al. 2018).
        signed: searched symmetric ranges have the code without a counterpart on the side of a group's largest weight, by
            a scale that is negative where this is positive: a tenth less squared error at 4 bits, for kernels that take
            such scales.
        ignore: patterns (`*.down_proj.*`) of weight names to leave alone.
        head: quantize the linear that makes the logits too. One that is tied with the embedding gets
            codes of its own; the embedding keeps its tensor.
    """

    name: ClassVar[str] = "quantize-rtn"
    lossy: ClassVar[bool] = True

    bits: int = 4
    group_size: GroupSize = None
    symmetric: bool = True
    ranges: Literal["searched", "full"] = "searched"
    signed: bool = False
    ignore: tuple[str, ...] = ()
    head: bool = False

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_sizes(self.group_size)

    def budget(self, before: Program) -> Budget:
        return weight_budget(self.bits)

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Quantize a clone of `program`.

        Raises:
            InputError: the group size does not divide a K (names the weight), or a weight is not finite.
        """
        selection = select_in_groups(program, self.ignore, self.head, self.group_size)

        def quantize(edited: Program, site: Linear) -> None:
            self._quantize(edited, site, selection.sizes[weight_label(edited, site)])

        return quantize_selected(program, selection, quantize)

    def _quantize(self, program: Program, site: Linear, group_size: int) -> None:
        source = weight_name(program, site)
        try:
            codes, scale, zero = self._rounded(weight_rows(program, site), group_size)
        except InputError as error:
            raise InputError(error.what, where=source, why=error.why, remedy=error.remedy) from error
        entry = WeightQuantization(
            method="rtn",
            bits=self.bits,
            group_size=group_size,
            symmetric=self.symmetric,
            source=source,
        )
        replace_weight(program, site, codes, scale, zero, entry)

    def _rounded(self, rows: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes uint8 [N, K], scales [N, G] in the weight's dtype and zero points uint8 [N, G] of a weight [N, K].

        Raises:
            InputError: as `quantize_groups`.
        """
        if self.bits not in _LEAST or self.ranges == "full":
            return quantize_groups(rows, self.bits, group_size, self.symmetric)
        check_group_size(group_size, [rows.shape[1]])
        check_finite_weight(*rows.aminmax())
        least, signed = _LEAST[self.bits], self.signed
        found = search(rows, self.bits, group_size, self.symmetric, steps=_STEPS, least=least, signed=signed)
        found = replace(found, scale=found.scale.to(rows.dtype).float())
        zero = None if self.symmetric else found.zero.to(torch.uint8)
        return found.stored_codes(rows), found.scale.to(rows.dtype), zero
