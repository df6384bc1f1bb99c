"""linear(x, W)  ->  linear(x, dequantize_codebook(codes, scale, table)), codes in NF4."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from optc.compiler.analysis.dataflow import aten
from optc.compiler.analysis.linears import Linear
from optc.compiler.formats.group_sizes import check_group_size
from optc.compiler.formats.integer import check_finite_weight, quantize_groups
from optc.compiler.ir.contract import WeightQuantization
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import add_weight, insert_call
from optc.compiler.rewriting.budget import Budget
from optc.compiler.rewriting.passes import Pass, PassContext, PassResult
from optc.compiler.rewriting.weights import record_weight
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

TABLE = "nf4_table"
SCALE_BLOCK = 256
"""Scales that share a second-level scale."""


@dataclass(frozen=True, kw_only=True)
class QuantizeNf4(Pass):
    """linear(x, W)  ->  linear(x, optc.dequantize_codebook(codes, scale, table, bits=4, group_size=))

    The 4-bit NormalFloat of QLoRA (Dettmers et al. 2023, https://arxiv.org/abs/2305.14314): 16 quantiles of the
    normal distribution, scaled to the largest magnitude of each block. Needs no calibration. Which linears: as
    quantize-rtn.

    Attributes:
        group_size: neighbours along K that share a scale; 0 is a whole row.
        double_quant: keep the scales in 8 bits themselves, in blocks of 256, less their mean (4.13 bits per weight
            at blocks of 64 instead of 4.5 with float32 scales).
        ignore: patterns (`*.down_proj.*`) of weight names to leave alone.
        head: quantize the linear that makes the logits too.
    """

    name: ClassVar[str] = "quantize-nf4"
    lossy: ClassVar[bool] = True

    group_size: int = 64
    double_quant: bool = False
    ignore: tuple[str, ...] = ()
    head: bool = False

    def __post_init__(self) -> None:
        check_group_size(self.group_size, [])

    def budget(self, before: Program) -> Budget:
        return weight_budget(4)

    def run(self, program: Program, context: PassContext) -> PassResult:
        """Quantize a clone of `program`.

        Raises:
            InputError: the group size does not divide a K (names the weight), or a weight is not finite.
        """
        selection = select_in_groups(program, self.ignore, self.head, self.group_size)
        return quantize_selected(program, selection, self._quantize)

    def _quantize(self, program: Program, site: Linear) -> None:
        weight = dequantized_before(program, site)
        if weight is None:
            source = weight_label(program, site)
            rows = weight_rows(program, site)
            codes, scale = quantize_codebook(rows, normal_float(), self.group_size, source)
            entry = WeightQuantization(
                method="nf4", bits=4, group_size=self.group_size, symmetric=False, source=source, format="nf4"
            )
            table = _table(program)
            made = (
                _double_quantized(program, site, scale, rows.dtype)
                if self.double_quant
                else weight_part(program, site, "scale", scale.to(rows.dtype))
            )
            weight = place_codes(program, site, codes, [made, table], entry)
        read_instead(program, site, weight)


def normal_float() -> Tensor:
    """The 16 values of NF4, ascending, float32.

    Appendix E of the paper: quantiles of the standard normal distribution at even steps of probability from
    `offset` to 1/2 for the 8 positive values and the 7 negative ones, and an exact zero; divided by the largest.
    `offset` halves the probability beyond the outermost value: (1 - 1/32 + 1 - 1/30) / 2.
    """
    offset = 1 - (1 / 32 + 1 / 30) / 2
    steps = [torch.linspace(offset, 0.5, count, dtype=torch.float64)[:-1] for count in (9, 8)]
    positive, negative = (torch.special.ndtri(step) for step in steps)
    values = torch.cat([-negative, torch.zeros(1, dtype=torch.float64), positive]).sort().values
    return (values / values.max()).float()


def quantize_codebook(weight: Tensor, table: Tensor, group_size: int, where: str) -> tuple[Tensor, Tensor]:
    """(codes uint8 [N,K], scale float32 [N,G]) of a weight [N,K]: the nearest values of an ascending table.

    The scale is the largest magnitude of a group; a group of zeros gets 1.

    Raises:
        InputError: the weight is not finite; `where` names it.
    """
    rows, columns = weight.shape
    groups = weight.detach().float().reshape(rows, -1, group_size or columns)
    largest = groups.abs().amax(-1)
    check_finite_weight(largest, where=where)
    scale = torch.where(largest > 0, largest, 1.0)
    middles = ((table[1:] + table[:-1]) / 2).to(scale.device)
    codes = torch.bucketize((groups / scale[..., None]).contiguous(), middles)
    return codes.reshape(rows, columns).to(torch.uint8), scale


def quantize_scales(scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(codes uint8 [blocks, 256], scale float32 [blocks, 1], mean float32 []) of the scales [N,G] of a weight.

    Scales are positive, so their mean is taken off before they are rounded symmetrically (section 3 of the paper).
    The last block is filled up with the mean.
    """
    mean = scale.mean()
    centred = (scale - mean).flatten()
    centred = torch.nn.functional.pad(centred, (0, -centred.numel() % SCALE_BLOCK))
    codes, step, _ = quantize_groups(centred.reshape(-1, SCALE_BLOCK), 8, 0, True)
    return codes, step, mean


def _table(program: Program) -> Node:
    """The placeholder of the table, one for all weights."""
    found = next((node for node in program.graph.nodes if program.weight_of(node) == TABLE), None)
    if found is not None:
        return found
    record_weight(program, TABLE, ())
    device = next(weight.device for _, weight in program.weights())
    return add_weight(program, TABLE, normal_float().clone().to(device))


def _double_quantized(program: Program, site: Linear, scale: Tensor, dtype: torch.dtype) -> Node:
    """The calls that make scales [N,G] of their own codes, in front of a linear."""
    tensors = zip(("codes", "scale", "mean"), quantize_scales(scale), strict=True)
    codes, step, mean = (weight_part(program, site, f"scale_{part}", tensor) for part, tensor in tensors)

    def call(target: object, *args: object, **kwargs: object) -> Node:
        return insert_call(program, site.node, target, args, kwargs)

    blocks = call(torch.ops.optc.dequantize.default, codes, step, None, bits=8, group_size=0)
    flat = call(aten.reshape.default, call(aten.add.Tensor, blocks, mean), [-1])
    kept = call(aten.slice.Tensor, flat, 0, 0, scale.numel())
    shaped = call(aten.reshape.default, kept, list(scale.shape))
    return shaped if dtype is torch.float32 else call(aten.to.dtype, shaped, dtype)
