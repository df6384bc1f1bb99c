"""linear(x, W)  ->  linear(x, dequantize(codes, scale, zero)), codes by GPTQ."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from optc.passes.quantization.arithmetic import grid
from optc.passes.quantization.arithmetic.calibrated import CalibratedPass, Rounded, Statistics
from optc.passes.quantization.arithmetic.gptq import compensated, factorize, solve
from optc.passes.quantization.arithmetic.refine import descend, refit


@dataclass(frozen=True, kw_only=True)
class QuantizeGptq(CalibratedPass):
    """linear(x, W)  ->  linear(x, optc.dequantize(codes, scale, zero, bits=, group_size=)), codes by GPTQ

    Frantar et al. 2022, https://arxiv.org/abs/2210.17323: columns are rounded one by one, in falling order of
    importance on grids fixed beforehand, and each error is made up for by the columns to come. The inputs are
    those of the model whose earlier linears are quantized.

    Attributes:
        damping: share of the mean of the Hessian's diagonal that is added to it; raised where it must be.
        search: shrink each group's range to where the squared error of the weights is least.
        sweeps: coordinate descent over the codes after GPTQ, each with scales fitted anew by least squares.
        follow: round towards the outputs of the unquantized model rather than those that the already quantized
            inputs give (error propagation, https://arxiv.org/abs/2504.09629): 0 not at all, 1 fully.
    """

    name: ClassVar[str] = "quantize-gptq"
    method: ClassVar[str] = "gptq"

    damping: float = 0.01
    act_order: bool = True
    search: bool = True
    sweeps: int = 0
    follow: float = 0.0

    @property
    def follows_unquantized(self) -> bool:
        return self.follow > 0

    def round_group(self, weight: Tensor, statistics: Statistics, bits: int, group_size: int, where: str) -> Rounded:
        factor = factorize(statistics.gram, self.damping, act_order=self.act_order, where=where)
        if statistics.drift is not None:
            weight = compensated(weight, statistics.gram, statistics.drift, self.follow, self.damping, where)
        find = grid.search if self.search else grid.full_range
        found = find(weight, bits, group_size, self.symmetric)
        codes = solve(weight, factor, found)
        for _ in range(self.sweeps):
            found = refit(weight, statistics.gram, found, codes)
            codes = descend(weight, statistics.gram, found, codes)
        return Rounded(codes, found, damping=factor.damping)
