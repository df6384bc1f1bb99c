"""The loss of a language-model head without the logits: they are made, used and dropped in chunks of tokens.

The gradient is computed with the loss, so nothing is recomputed and what is kept is one hidden-sized tensor in place of
tokens x vocabulary. The idea of Liger Kernel (Hsu et al. 2024, https://arxiv.org/abs/2410.10989) in plain torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORED = -100


@dataclass(frozen=True)
class Teacher:
    """What the distributions of a teacher are made of, and their part in the loss.

    Attributes:
        hidden: [T, D'], what its head reads at the student's positions; weight: [V, D'] of its head.
        share, temperature: of `DistillConfig`.
    """

    hidden: Tensor
    weight: Tensor
    share: float
    temperature: float


class LossParts(NamedTuple):
    """Sums over label tokens, float32 scalars.

    Attributes:
        total: has the gradient. cross_entropy: its part. divergence: KL(teacher || student); 0 without a teacher.
    """

    total: Tensor
    cross_entropy: Tensor
    divergence: Tensor


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    chunk: int = 2048,
    compiled: bool = False,
    teacher: Teacher | None = None,
) -> LossParts:
    """The sum over tokens of -log softmax(hidden @ weight^T)[label], in fp32; labels are aligned with `hidden`. With a
    teacher its KL divergence has a share, as `DistillConfig` defines it.

    Products run in autocast's type where autocast is on, as `nn.Linear` would; softmax and sums in fp32.

    Args:
        hidden: [T, D]; weight: [V, D]; labels: int64 [T], -100 where there is no label.
        chunk: tokens whose logits are alive at a time.
        compiled: fuse the softmax of a chunk by torch.compile.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    return LossParts(*_LinearCrossEntropy.apply(hidden, weight, labels, dtype, chunk, compiled, teacher))


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
        teacher: Teacher | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        step = _compiled_chunk() if compiled else _chunk
        with torch.autocast(hidden.device.type, enabled=False):
            table = weight.to(dtype)
            sums = torch.zeros(3, dtype=torch.float32, device=hidden.device)
            by_hidden = torch.empty_like(hidden) if hidden.requires_grad else None
            by_weight = torch.zeros_like(weight, dtype=torch.float32) if weight.requires_grad else None
            for begin in range(0, hidden.shape[0], chunk):
                part = hidden[begin : begin + chunk].to(dtype)
                target = None if teacher is None else _target(teacher, begin, chunk, dtype)
                share, temperature = (0.0, 1.0) if teacher is None else (teacher.share, teacher.temperature)
                found, slope = step(part @ table.T, labels[begin : begin + chunk], target, share, temperature)
                sums += found
                if by_hidden is not None:
                    by_hidden[begin : begin + chunk] = slope @ table
                if by_weight is not None:
                    by_weight += _sums(slope, part)
        ctx.save_for_backward(by_hidden, by_weight)
        total, entropy, divergence = sums.clone().unbind()
        ctx.mark_non_differentiable(entropy, divergence)
        return total, entropy, divergence

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:
        by_hidden, by_weight = ctx.saved_tensors
        slope = slopes[0]
        return (
            None if by_hidden is None else by_hidden * slope,
            None if by_weight is None else by_weight * slope,
            *[None] * 5,
        )


def _target(teacher: Teacher, begin: int, chunk: int, dtype: torch.dtype) -> Tensor:
    """The teacher's logits of a chunk."""
    return teacher.hidden[begin : begin + chunk].to(dtype) @ teacher.weight.to(dtype).T


def _sums(slope: Tensor, hidden: Tensor) -> Tensor:
    """slope^T hidden: the gradient by the weights. Not divided by the number of tokens yet, it can be beyond fp16."""
    if slope.dtype != torch.float16:
        return slope.T @ hidden
    if slope.is_cuda:
        return torch.mm(slope.T, hidden, out_dtype=torch.float32)
    return slope.T.float() @ hidden.float()


def _chunk(
    logits: Tensor, labels: Tensor, target: Tensor | None, share: float, temperature: float, fused: bool = False
) -> tuple[Tensor, Tensor]:
    """The loss sums of a chunk [3] (see `LossParts`), and the gradient of the first by the logits in their type.

    Args:
        target: the teacher's logits.
        fused: make the one-hot labels by comparing columns: torch.compile fuses that with the softmax, eager torch
            would write it out.
    """
    found = logits.float().log_softmax(-1)
    labelled = (labels != IGNORED).unsqueeze(-1)
    place = labels.clamp_min(0).unsqueeze(-1)
    entropy = -(found.gather(-1, place) * labelled).sum()
    if fused:
        columns = torch.arange(found.shape[-1], device=found.device)
        slope = found.exp() - (columns == place).float()
    else:
        slope = found.exp()
        slope.scatter_add_(-1, place, slope.new_full(place.shape, -1.0))
    if target is None:
        zero = torch.zeros_like(entropy)
        return torch.stack([entropy, entropy, zero]), (slope * labelled).to(logits.dtype)
    log_q = (logits.float() / temperature).log_softmax(-1)
    log_p = (target.float() / temperature).log_softmax(-1)
    divergence = ((log_p.exp() * (log_p - log_q)).sum(-1, keepdim=True) * labelled).sum()
    slope = (1 - share) * slope + share * temperature * (log_q.exp() - log_p.exp())
    total = (1 - share) * entropy + share * temperature**2 * divergence
    return torch.stack([total, entropy, divergence]), (slope * labelled).to(logits.dtype)


@cache
def _compiled_chunk() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(partial(_chunk, fused=True), dynamic=False)
