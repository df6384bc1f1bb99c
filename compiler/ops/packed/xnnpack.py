"""XNNPACK's products with weights of 4 and 8 bits, which round activations to 8 bits as they come ("8da4w", "8da8w").

`linear_dynamic` mirrors its fully connected operators qd8-f32-qb4w (scales per group of weights) and qd8-f32-qc8w
(per output channel). The arithmetic of the activations is that of `choose_qparams_per_token_asymmetric` in
torch/ao/quantization/fx/_decomposed.py: a range of each token that holds zero, 255 steps, a zero point in int8.
Made by `pack-xnnpack` only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optc.compiler.ops.library import define

LOW, HIGH = -128.0, 127.0


def _rounded_tokens(x: Tensor) -> Tensor:
    """x float32 [...,K] -> the numbers that its int8 codes stand for, one scale and zero point per token."""
    low, high = x.amin(-1, keepdim=True).clamp(max=0.0), x.amax(-1, keepdim=True).clamp(min=0.0)
    scale = ((high - low) / (HIGH - LOW)).clamp(min=torch.finfo(torch.float32).eps)
    below, above = low / scale, high / scale
    zero = torch.where(LOW + below + HIGH + above > 0, LOW - below, HIGH - above)
    zero = zero.clamp(LOW, HIGH).round()
    codes = (torch.round(x * (1.0 / scale)) + zero).clamp(LOW, HIGH)
    return (codes - zero) * scale


def _linear_dynamic(
    x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, *, bits: int, group_size: int
) -> Tensor:
    """linear(round(x), codes * scale, bias).

    Args:
        x: float32 [...,K]. codes: int8 [N,K] of `bits` bits, signed. bias: [N].
        scale: float32 [N,K/group_size], bfloat16 numbers; or [N] for group size 0.
    """
    rows, columns = codes.shape
    size = group_size or columns
    weight = codes.float().reshape(rows, columns // size, size) * scale.reshape(rows, -1)[..., None]
    return torch.nn.functional.linear(_rounded_tokens(x), weight.reshape(rows, columns), bias)


define(
    "linear_dynamic(Tensor x, Tensor codes, Tensor scale, Tensor? bias, *, int bits, int group_size) -> Tensor",
    _linear_dynamic,
    lambda x, codes, *_, **__: x.new_empty((*x.shape[:-1], codes.shape[0])),
    rounds_inside=lambda _: True,
)
