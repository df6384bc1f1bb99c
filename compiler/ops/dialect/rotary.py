"""Rotary position embedding (Su et al. 2021, https://arxiv.org/abs/2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor

from optc.compiler.ops.library import define


def rotate(x: Tensor, position: Tensor, inv_freq: Tensor, *, scaling: float, interleaved: bool) -> Tensor:
    """Rotate the first 2*len(inv_freq) features of x [B,H,S,D] by angle position[b,s] * inv_freq.

    `interleaved` pairs features (2i, 2i+1), else (i, i + R/2). Angles, cos and sin are computed in
    float32, multiplied by `scaling` and rounded to x's dtype, as transformers does.
    """
    angle = position[:, None, :, None].float() * inv_freq.float()
    cos, sin = (torch.cos(angle) * scaling).to(x.dtype), (torch.sin(angle) * scaling).to(x.dtype)
    size = 2 * inv_freq.shape[0]
    rotated, rest = x[..., :size], x[..., size:]
    if interleaved:
        a, b = rotated[..., 0::2], rotated[..., 1::2]
        out = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    else:
        a, b = rotated.chunk(2, -1)
        out = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    return torch.cat([out, rest], -1) if rest.shape[-1] else out


define(
    "rotary(Tensor x, Tensor position, Tensor inv_freq, *, float scaling, bool interleaved) -> Tensor",
    rotate,
    lambda x, *_, **__: torch.empty_like(x, memory_format=torch.contiguous_format),
    aten=rotate,
)
