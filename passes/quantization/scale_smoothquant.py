"""linear(x, W)  ->  linear(x / s, W * s), s balancing the ranges of inputs and weights (SmoothQuant)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from optc.compiler.diagnostics import UsageError
from optc.compiler.ir.program import Program
from optc.passes.quantization.arithmetic.folding import Fold
from optc.passes.quantization.arithmetic.groups import Group, rows, weight_label, weight_rows
from optc.passes.quantization.arithmetic.ranges import check_finite
from optc.passes.quantization.arithmetic.scale_pass import ScalePass
from optc.passes.quantization.arithmetic.scaling import smooth_scales
from optc.passes.quantization.arithmetic.selection import Selection
from optc.passes.quantization.arithmetic.stream import Stream


@dataclass(frozen=True, kw_only=True)
class ScaleSmoothQuant(ScalePass):
    """linear(norm(x, w), W)  ->  linear(norm(x, w / s), W * s), s = max|x|^alpha / max|W|^(1 - alpha)

    SmoothQuant (Xiao et al. 2022, https://arxiv.org/abs/2211.10438): outliers of activations are moved into the
    weights, so that 8-bit activations keep their small channels.

    Attributes:
        alpha: 0 moves nothing of the inputs' range into the weights, 1 all of it.
    """

    name: ClassVar[str] = "scale-smoothquant"

    alpha: float = 0.8

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"alpha {self.alpha} is out of range", remedy="use a value from 0 to 1")

    def choose(self, program: Program, stream: Stream, group: Group, fold: Fold, selection: Selection) -> Tensor:
        largest = torch.stack([x.abs().amax(0) for x in rows(stream, group.root)]).amax(0)
        check_finite(largest, f"input of {weight_label(program, group.sites[0])}")
        weights = [weight_rows(program, site) for site in group.sites]
        return smooth_scales(weights, largest, fold, self.alpha)
