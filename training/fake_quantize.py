"""Fake quantization: values as the compiled program will have them, gradients as if they were not rounded.

Forward, the arithmetic is that of the passes and of `optc.dequantize`, `optc.quantize` and their kin, bit for bit.
Backward, rounding is the identity (the straight-through estimator, Bengio et al. 2013, https://arxiv.org/abs/1308.3432)
and clipping cuts the gradient; scales get the gradient of Esser et al. 2020 (LSQ, https://arxiv.org/abs/1902.08153).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from optc.compiler.ops.dialect import quantization as _quantization  # noqa: F401  (registers the operators)
from optc.compiler.ops.dialect.quantization import FORMATS
from optc.passes.quantization.arithmetic.grid import Grid, storable

_optc = torch.ops.optc


class _Weight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
        ctx.save_for_backward(weight, scale, zero)
        ctx.bits = bits
        grid = _grid(weight, scale, zero, bits)
        return grid.values(grid.codes(weight.float()))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale, zero = ctx.saved_tensors
        top, size = 2**ctx.bits - 1, weight.shape[1] // scale.shape[1]
        shape = (weight.shape[0], -1, size)
        ratio = weight.float().reshape(shape) / scale[..., None]
        codes = torch.round(ratio + zero[..., None])
        inside = (codes >= 0) & (codes <= top)
        grad = grads[0].reshape(shape)
        to_weight = (grad * inside).reshape(weight.shape).to(weight.dtype)
        if not ctx.needs_input_grad[1]:
            return to_weight, None, None, None
        # d value / d scale: the code's distance from the ratio inside, the last code outside.
        slope = codes.clamp(0, top) - zero[..., None] - torch.where(inside, ratio, 0.0)
        to_scale = (grad * slope).sum(-1) / math.sqrt(size * (2 ** (ctx.bits - 1) - 1))
        return to_weight, to_scale, None, None


class _StorableScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scale: Tensor) -> Tensor:
        return storable(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class _Tokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, format: str) -> Tensor:
        codes, scale = _optc.quantize_dynamic(x, format=format)
        value: Tensor = _optc.dequantize_activation(codes, scale, dtype=x.dtype)
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None  # the scale reaches the largest value: nothing is clipped


class _Static(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, format: str) -> Tensor:
        ctx.save_for_backward(x.float().abs() <= scale * FORMATS[format][1])
        value: Tensor = _optc.dequantize_activation(_optc.quantize(x, scale, format=format), scale, dtype=x.dtype)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return grads[0] * inside, None, None


def fake_quantize_weight(weight: Tensor, grid: Grid) -> Tensor:
    """The values of a grid that are nearest to a weight, float32 [N, K].

    The gradient of a scale is that of LSQ, times 1 / sqrt(group size * largest positive code): steps of scales and
    weights then compare, whatever the bits.

    Args:
        weight: [N, K].
        grid: with scales that may need a gradient.
    """
    value: Tensor = _Weight.apply(weight, grid.scale, grid.zero, grid.bits)
    return value


def storable_scale(scale: Tensor) -> Tensor:
    """Scales as the exporters keep them (`optc.passes.quantization.arithmetic.grid.storable`); the gradient passes."""
    value: Tensor = _StorableScale.apply(scale)
    return value


def fake_quantize_tokens(x: Tensor, format: str = "int8") -> Tensor:
    """x [..., K], each token rounded with a scale of its own: `optc.quantize_dynamic` and back."""
    value: Tensor = _Tokens.apply(x, format)
    return value


def fake_quantize_static(x: Tensor, scale: Tensor, format: str = "int8") -> Tensor:
    """x rounded with scales that broadcast to it, clipped: `optc.quantize` and back."""
    value: Tensor = _Static.apply(x, scale, format)
    return value


def _grid(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Grid:
    size = weight.shape[1] // scale.shape[1]
    return Grid(scale, zero, bits, size, symmetric=False)
