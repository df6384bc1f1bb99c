"""Cross-entropy of a language-model head without the logits: they are made, used and dropped in chunks of tokens.

The gradient is computed with the loss, so nothing is recomputed and what is kept is one hidden-sized tensor in place of
tokens x vocabulary. The idea of Liger Kernel (Hsu et al. 2024, https://arxiv.org/abs/2410.10989) in plain torch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

IGNORED = -100


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk: int = 2048, compiled: bool = False
) -> Tensor:
    """The sum over tokens of -log softmax(hidden @ weight^T)[label], in fp32; labels are aligned with `hidden`.

    Products run in autocast's type where autocast is on, as `nn.Linear` would; softmax and sums in fp32.

    Args:
        hidden: [T, D]; weight: [V, D]; labels: int64 [T], -100 where there is no label.
        chunk: tokens whose logits are alive at a time.
        compiled: fuse the softmax of a chunk by torch.compile.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    found: Tensor = _LinearCrossEntropy.apply(hidden, weight, labels, dtype, chunk, compiled)
    return found


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        dtype: torch.dtype,
        chunk: int,
        compiled: bool,
    ) -> Tensor:
        step = _compiled_chunk() if compiled else _chunk
        with torch.autocast(hidden.device.type, enabled=False):
            table = weight.to(dtype)
            total = torch.zeros((), dtype=torch.float32, device=hidden.device)
            by_hidden = torch.empty_like(hidden) if hidden.requires_grad else None
            by_weight = torch.zeros_like(weight, dtype=torch.float32) if weight.requires_grad else None
            for begin in range(0, hidden.shape[0], chunk):
                part = hidden[begin : begin + chunk].to(dtype)
                loss, slope = step(part @ table.T, labels[begin : begin + chunk])
                total += loss
                if by_hidden is not None:
                    by_hidden[begin : begin + chunk] = slope @ table
                if by_weight is not None:
                    by_weight += slope.T @ part
        ctx.save_for_backward(by_hidden, by_weight)
        return total

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        by_hidden, by_weight = ctx.saved_tensors
        (slope,) = slopes
        return (
            None if by_hidden is None else by_hidden * slope,
            None if by_weight is None else by_weight * slope,
            *[None] * 4,
        )


def _chunk(logits: Tensor, labels: Tensor, fused: bool = False) -> tuple[Tensor, Tensor]:
    """The loss sum of a chunk, and its gradient by the logits in their type.

    Args:
        fused: make the one-hot labels by comparing columns: torch.compile fuses that with the softmax, eager torch
            would write it out.
    """
    found = logits.float().log_softmax(-1)
    labelled = (labels != IGNORED).unsqueeze(-1)
    target = labels.clamp_min(0).unsqueeze(-1)
    loss = -(found.gather(-1, target) * labelled).sum()
    if fused:
        columns = torch.arange(found.shape[-1], device=found.device)
        slope = (found.exp() - (columns == target).float()) * labelled
    else:
        slope = found.exp_()
        slope.scatter_add_(-1, target, slope.new_full(target.shape, -1.0))
        slope *= labelled
    return loss, slope.to(logits.dtype)


@cache
def _compiled_chunk() -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return torch.compile(partial(_chunk, fused=True), dynamic=False)
