"""Experts as the CUDA kernels (compiler/kernels/cuda/experts) compute them: those alone that a token has chosen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from optc.compiler.ops.library import define
from optc.compiler.ops.packed.cuda import finish


def chosen_share(indices: Tensor, weights: Tensor, expert: int) -> Tensor:
    """What an expert counts for each token, [T, 1]: its weight, 0 where it was not chosen."""
    return weights.masked_fill(indices != expert, 0.0).sum(-1, keepdim=True)


def _fused_experts(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    indices: Tensor,
    weights: Tensor,
    residual: Tensor | None,
    *,
    activation: str = "",
    gated: bool = False,
) -> Tensor:
    """The weighted sum over a token's experts e of down[e] @ act(up[e] @ x), plus residual, computed in float32 and
    rounded once, to x's type.

    Args:
        x: [T, K]. up: [E, N, K]. down: [E, C, H]. residual: [T, C]; all in x's type.
        indices: int64 [T, S], a token's experts. weights: [T, S], of any floating type.
        activation, gated: of up[e] @ x, as `fused_linear` has them; H is N, or N/2 where gated.
    """
    values, y = x.float(), None if residual is None else residual.float()
    for expert in range(up.shape[0]):
        hidden = finish(F.linear(values, up[expert].float()), activation, gated, None)
        part = F.linear(hidden, down[expert].float()) * chosen_share(indices, weights.float(), expert)
        y = part if y is None else y + part
    assert y is not None
    return y.to(x.dtype)


def _fused_experts_fake(x: Tensor, up: Tensor, down: Tensor, *_: object, **__: Any) -> Tensor:
    return x.new_empty((x.shape[0], down.shape[1]))


define(
    "fused_experts(Tensor x, Tensor up, Tensor down, Tensor indices, Tensor weights, Tensor? residual, *, "
    'str activation="", bool gated=False) -> Tensor',
    _fused_experts,
    _fused_experts_fake,
    aten=_fused_experts,
)


def _choose_experts(logits: Tensor, *, slots: int, normalized: bool) -> tuple[Tensor, Tensor]:
    """The `slots` most probable experts of each token, by the softmax of logits [T, E] in float32.

    Returns:
        Their probabilities, float32 [T, slots], divided by their sum where `normalized`, the largest first, and the
        experts, int64 [T, slots]. Which of equal ones is chosen is not said.
    """
    weights, indices = torch.softmax(logits.float(), -1).topk(slots)
    return weights / weights.sum(-1, keepdim=True) if normalized else weights, indices


def _choose_experts_fake(logits: Tensor, *, slots: int, normalized: bool) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], slots)
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int64)


define(
    "choose_experts(Tensor logits, *, int slots, bool normalized) -> (Tensor, Tensor)",
    _choose_experts,
    _choose_experts_fake,
    aten=_choose_experts,
)
