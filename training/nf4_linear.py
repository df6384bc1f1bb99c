"""A frozen linear whose weight is held in 4-bit NF4, in the arithmetic of the pass quantize-nf4."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from optc.compiler.analysis.module_linears import is_conv1d, linear_shape
from optc.compiler.diagnostics import InputError
from optc.passes.quantization.nf4 import normal_float, quantize_codebook, quantize_scales

_optc = torch.ops.optc


class Nf4Linear(nn.Linear):
    """A linear without a trainable weight: two codes per byte, made dense for a product and then dropped.

    Codes and scales are those that the pass quantize-nf4 makes of the same weight, so `optc compile BASE --quant nf4`
    gives the base that adapters were trained on. A backward makes the weight anew: activations hold no dense copy.

    Attributes:
        packed: uint8 [N, ceil(K / 2)], the even columns in the low half of each byte.
        scale: float32 [N, G]; with double quantization uint8 [blocks, 256], and scale_step float32 [blocks, 1] and
            scale_mean float32 [] beside it.
        weight: float32 [N, K], computed at every reading.
        transposed: whether it stands in place of a Conv1D, whose weight is [K, N].
    """

    packed: Tensor
    scale: Tensor
    scale_step: Tensor | None
    scale_mean: Tensor | None
    table: Tensor

    def __init__(self, linear: nn.Module, where: str, group_size: int, double_quant: bool) -> None:
        """Round the weight of a linear.

        Raises:
            InputError: the weight is not finite; `where` names it.
        """
        nn.Module.__init__(self)
        weight, bias = linear.weight, linear.bias
        assert isinstance(weight, Tensor)
        assert bias is None or isinstance(bias, nn.Parameter)
        self.out_features, self.in_features = linear_shape(linear)
        self.transposed = is_conv1d(linear)
        weight = weight.T if self.transposed else weight
        self.group_size, self.bias = group_size, bias
        if self.in_features % 2:
            raise InputError(
                f"K = {self.in_features} is odd",
                where=where,
                why="NF4 keeps two codes in a byte",
                remedy="use lora.base=dense",
            )
        with torch.no_grad():
            codes, scale = quantize_codebook(weight, normal_float().to(weight.device), group_size, where)
            self.register_buffer("packed", codes[:, 0::2] | codes[:, 1::2] << 4)
            parts = quantize_scales(scale) if double_quant else (scale, None, None)
        for name, part in zip(("scale", "scale_step", "scale_mean"), parts, strict=True):
            self.register_buffer(name, part)
        self.register_buffer("table", normal_float().to(weight.device), persistent=False)
        self.train(linear.training)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """float32 [N, K], what the codes stand for."""
        return self.dense(torch.float32)

    def codes(self) -> Tensor:
        """uint8 [N, K]."""
        return torch.stack((self.packed & 15, self.packed >> 4), -1).flatten(1)

    def scales(self) -> Tensor:
        """float32 [N, G]."""
        if self.scale_step is None or self.scale_mean is None:
            return self.scale
        groups = self.in_features // (self.group_size or self.in_features)
        values = _optc.dequantize(self.scale, self.scale_step, None, bits=8, group_size=0) + self.scale_mean
        kept: Tensor = values.reshape(-1)[: self.out_features * groups]
        return kept.reshape(self.out_features, groups)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """[N, K], scales rounded to `dtype` first, as the pass has it."""
        value: Tensor = _optc.dequantize_codebook(
            self.codes(), self.scales().to(dtype), self.table, bits=4, group_size=self.group_size
        )
        return value

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        product: Tensor = _Product.apply(x, self)
        return product if self.bias is None else product + self.bias.to(product.dtype)

    def stored_bytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(part.nbytes for part in self.buffers() if part is not self.table)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, nf4, group_size={self.group_size}"


class _Product(torch.autograd.Function):
    """x W^T with a weight that is made of codes both times."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: Nf4Linear) -> Tensor:
        ctx.linear = linear
        return nn.functional.linear(x, linear.dense(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.linear.dense(grads[0].dtype), None
