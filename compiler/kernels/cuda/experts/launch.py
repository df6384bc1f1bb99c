"""Launch of `choose_experts`, and of `fused_experts`: kernels that read the chosen ones, or every one by cuBLAS."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from optc.compiler.kernels.cuda.dispatch import dependent_launch
from optc.compiler.kernels.cuda.experts.chosen import choose, expert_hidden, expert_sum
from optc.compiler.ops.packed.cuda import finish
from optc.compiler.ops.packed.cuda_experts import chosen_share

BLOCK_N, BLOCK_K, WARPS = 4, 1024, 4
"""Rows and columns of a weight that a program holds at a time: 32 elements a thread."""
ROWS = 512
"""Tokens of a product of every expert: enough to be bound by arithmetic."""


def choose_experts(logits: Tensor, *, slots: int, normalized: bool) -> tuple[Tensor, Tensor]:
    """The op, for calls that the kernel accepts."""
    tokens, experts = logits.shape
    weights = logits.new_empty((tokens, slots), dtype=torch.float32)
    indices = logits.new_empty((tokens, slots), dtype=torch.int64)
    if tokens:
        pdl = dependent_launch(logits.device)
        choose[(tokens,)](
            logits, weights, indices, logits.stride(0), E=experts, SLOTS=slots, NORMALIZED=normalized,
            BLOCK=triton.next_power_of_2(experts), BLOCK_SLOTS=triton.next_power_of_2(slots), PDL=pdl,
            num_warps=1, launch_pdl=pdl,
        )  # fmt: skip
    return weights, indices


def fused_experts(
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
    """The op, for calls that the kernel accepts. Where tokens have chosen as many experts as there are, all are read."""
    x, indices, weights = x.contiguous(), indices.contiguous(), weights.contiguous()
    residual = None if residual is None else residual.contiguous()
    if not x.shape[0]:
        return x.new_empty((0, down.shape[1]))
    run = chosen if indices.numel() <= up.shape[0] else every
    return run(x, up, down, indices, weights, residual, activation, gated)


def chosen(
    x: Tensor, up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, residual: Tensor | None, activation: str,
    gated: bool,
) -> Tensor:  # fmt: skip
    """Two launches; weights of experts that no token has chosen are not read."""
    tokens, slots = indices.shape
    size, wide = down.shape[2], x.shape[1]
    hidden = torch.empty(tokens * slots, size, device=x.device)
    y = x.new_empty((tokens, down.shape[1]))
    expert_hidden[(triton.cdiv(size, BLOCK_N), tokens * slots)](
        x, up, indices, hidden, size, ACTIVATION=activation, GATED=gated, **_options(x, slots, wide)
    )
    expert_sum[(triton.cdiv(y.shape[1], BLOCK_N), tokens)](
        hidden, down, indices, weights, residual, y, y.shape[1], **_options(x, slots, size)
    )
    return y


def _options(x: Tensor, slots: int, columns: int) -> dict[str, Any]:
    pdl = dependent_launch(x.device)
    block = min(BLOCK_K, triton.next_power_of_2(columns))
    tiles = {"BLOCK_N": BLOCK_N, "BLOCK_K": block, "num_warps": WARPS}
    return {"SLOTS": slots, "K": columns, "PDL": pdl, "launch_pdl": pdl, **tiles}


def every(
    x: Tensor, up: Tensor, down: Tensor, indices: Tensor, weights: Tensor, residual: Tensor | None, activation: str,
    gated: bool,
) -> Tensor:  # fmt: skip
    """All experts on all tokens, in x's type, without asking the host which were chosen: a graph may hold it.

    Some tokens at a time: what experts make of them is no activation of the graph, by which memory is planned.
    """
    y = x.new_empty((x.shape[0], down.shape[1]))
    for first in range(0, x.shape[0], ROWS):
        part = slice(first, first + ROWS)
        total = 0.0 if residual is None else residual[part].float()
        for expert in range(up.shape[0]):
            hidden = finish(F.linear(x[part], up[expert]).float(), activation, gated, None).to(x.dtype)
            share = chosen_share(indices[part], weights[part].float(), expert)
            total = total + F.linear(hidden, down[expert]).float() * share
        y[part] = total
    return y
