"""linear(x, W)  ->  linear(x, dequantize(codes, scale, zero)), nearest codes on the best clipped range."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from optc.passes.quantization.arithmetic import grid
from optc.passes.quantization.arithmetic.calibrated import CalibratedPass, Rounded, Statistics


@dataclass(frozen=True, kw_only=True)
class QuantizeClip(CalibratedPass):
    """linear(x, W)  ->  linear(x, optc.dequantize(codes, scale, zero, bits=, group_size=)), by a searched range

    Rounding to nearest after the range of every group was shrunk to where the error of the group's outputs on the
    calibration inputs is least: the clip search of AWQ (Lin et al. 2023, https://arxiv.org/abs/2306.00978).

    Attributes:
        least: the smallest share of the full range that is tried.
    """

    name: ClassVar[str] = "quantize-clip"
    method: ClassVar[str] = "clip"

    least: float = grid.LEAST

    def round_group(self, weight: Tensor, statistics: Statistics, bits: int, group_size: int, where: str) -> Rounded:
        found = grid.search(weight, bits, group_size, self.symmetric, statistics.gram, least=self.least)
        return Rounded(found.codes(weight), found)
