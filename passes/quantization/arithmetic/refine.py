"""Better codes and scales after a first rounding, still for ||(W - Q) X||^2 with the Gram matrix of X.

Coordinate descent over codes: each code moves to the best integer given all others (as in QuantEase, Behdin et
al. 2023, https://arxiv.org/abs/2309.01885). Scales: for given codes the error is quadratic in the scales of a
row, so the best ones solve a small linear system per row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optc.passes.quantization.arithmetic.grid import Grid

_BLOCK = 128
_RIDGE = 1e-4
_MOST_CHANGE = 0.25  # of a scale by one refit: beyond it the codes no longer fit


def descend(weight: Tensor, gram: Tensor, grid: Grid, codes: Tensor) -> Tensor:
    """One sweep of coordinate descent over the columns; codes float32 [N, K] of integers.

    The output error never rises.
    """
    columns = weight.shape[1]
    gram = gram.float()
    codes = codes.t().contiguous()  # [K, N]
    gap = grid.values(codes.t()).sub_(weight).t().contiguous()  # Q - W
    scale, zero = grid.scale.t().contiguous(), grid.zero.t().contiguous()
    del zero
    top = 2.0**grid.bits - 1
    slope = gram @ gap  # half the gradient
    diagonal = gram.diagonal().tolist()
    for start in range(0, columns, _BLOCK):
        end = min(start + _BLOCK, columns)
        local, change = gram[start:end, start:end], torch.zeros_like(gap[start:end])
        block = slope[start:end]
        for i in range(end - start):
            column = start + i
            if diagonal[column] <= 0:
                continue
            step = scale[column // grid.group_size]
            old = codes[column]
            new = (old - block[i] / (step * diagonal[column])).round_().clamp_(0, top)
            moved = (new - old).mul_(step)
            codes[column] = new
            change[i] = moved
            block.addr_(local[:, i], moved)
        # The rows of the block itself are up to date.
        slope[:start].addmm_(gram[:start, start:end], change)
        slope[end:].addmm_(gram[end:, start:end], change)
    return codes.t().contiguous()


def refit(weight: Tensor, gram: Tensor, grid: Grid, codes: Tensor) -> Grid:
    """The grid with the scales that give the least output error for these codes, zero points kept."""
    rows, columns = weight.shape
    size = grid.group_size
    groups = columns // size
    units = codes.reshape(rows, groups, size) - grid.zero[..., None]
    gram = gram.float()
    blocks = gram.reshape(groups, size, columns)
    target = weight @ gram  # [N, K]
    right = (target.reshape(rows, groups, size) * units).sum(-1)
    left = torch.empty(rows, groups, groups, device=weight.device)
    for group in range(groups):
        product = (units[:, group] @ blocks[group]).reshape(rows, groups, size)
        left[:, group] = (product * units).sum(-1)
    ridge = _RIDGE * left.diagonal(dim1=1, dim2=2).mean(-1).clamp(min=1e-12)
    left.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
    right = right + ridge[:, None] * grid.scale
    found = torch.linalg.solve(left, right)
    low, high = grid.scale * (1 - _MOST_CHANGE), grid.scale * (1 + _MOST_CHANGE)
    usable = torch.isfinite(found) & (grid.scale > 0)
    return grid.with_scale(torch.where(usable, torch.minimum(torch.maximum(found, low), high), grid.scale))
