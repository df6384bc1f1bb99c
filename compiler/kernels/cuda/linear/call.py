"""A call of `fused_linear`, as its launches take it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from optc.compiler.kernels.cuda.linear.configurations import Shape

BITS = {"int4": 4, "int8": 8}
"""Of the formats that are integers."""


class Linear(NamedTuple):
    """The arguments of a call, with tokens as rows.

    Attributes:
        x: [M, K]. residual: [M, N] or None. The others as `fused_linear` has them.
    """

    x: Tensor
    weight: Tensor
    scale: Tensor | None
    zero: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    norm: str
    eps: float
    activation: str
    gated: bool
    format: str
    group_size: int
    inputs: str = ""

    @property
    def shape(self) -> Shape:
        """What the tables are asked with."""
        rows = self.weight.shape[0]
        tokens, columns = self.x.shape
        return Shape(format=self.format, n=rows // 2 if self.gated else rows, k=columns, gated=self.gated, m=tokens)

    def new_result(self) -> Tensor:
        """y [M, N], not written yet."""
        return self.x.new_empty((self.x.shape[0], self.shape.n))
