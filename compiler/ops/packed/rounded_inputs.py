"""Activations as products of integers take them: rounded to int8, a scale for each group of columns."""

from __future__ import annotations

import torch
from torch import Tensor


def round_activations(x: Tensor, group: int) -> Tensor:
    """x [..., K] as float32, each group of K (0: the whole token) rounded to 255 steps of max|x| / 127."""
    size = group or x.shape[-1]
    codes, scale = torch.ops.optc.quantize_dynamic(x.unflatten(-1, (-1, size)), format="int8")
    return (codes.float() * scale).flatten(-2)
