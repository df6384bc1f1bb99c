"""linear(x, W)  ->  linear(x / s, W * s), s searched for the least error of rounding (AWQ)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from optc.compiler.formats.group_sizes import GroupSize, check_bits, check_sizes
from optc.compiler.ir.program import Program
from optc.passes.quantization.arithmetic.folding import Fold
from optc.passes.quantization.arithmetic.groups import Group, gram_matrix, weight_label, weight_rows
from optc.passes.quantization.arithmetic.scale_pass import ScalePass
from optc.passes.quantization.arithmetic.scaling import awq_scales
from optc.passes.quantization.arithmetic.selection import Selection, select_in_groups
from optc.passes.quantization.arithmetic.stream import Stream


@dataclass(frozen=True, kw_only=True)
class ScaleAwq(ScalePass):
    """linear(norm(x, w), W)  ->  linear(norm(x, w / s), W * s), s by AWQ

    Activation-aware scales (Lin et al. 2023, https://arxiv.org/abs/2306.00978): channels with large inputs get
    large weights, which rounding to a grid hurts less. Candidates are powers of the inputs' magnitude; the one with
    the least output error, computed from the inputs' Gram matrix, wins. Where s can be divided out is read off the
    dataflow: norm weights, rows of an earlier linear, the value path through attention.

    Attributes:
        bits, group_size, symmetric: of the rounding that follows.
        samples: calibration sequences that the search reads, at most: a few scales need less than a rounding.
    """

    name: ClassVar[str] = "scale-awq"

    bits: int = 4
    group_size: GroupSize = None
    symmetric: bool = True
    samples: int = 32

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_sizes(self.group_size)

    def select(self, program: Program) -> Selection:
        return select_in_groups(program, self.ignore, self.head, self.group_size)

    def choose(self, program: Program, stream: Stream, group: Group, fold: Fold, selection: Selection) -> Tensor:
        gram, _ = gram_matrix(stream, group)
        weights = [weight_rows(program, site) for site in group.sites]
        size = selection.sizes[weight_label(program, group.sites[0])]  # all of one input have one K
        scales, _ = awq_scales(weights, gram, fold, bits=self.bits, group_size=size, symmetric=self.symmetric)
        return scales
