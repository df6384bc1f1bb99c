"""Grids of representable values: scale and zero point of each group, searched for the least error.

value = (code - zero) * scale, as `optc.dequantize` computes it. The range of a group is shrunk step by step,
and the step with the least squared error wins: a few clipped weights for a finer grid. The search over
shrinking ranges is that of Frantar et al. 2022 (GPTQ, https://arxiv.org/abs/2210.17323, its code's `mse`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from optc.compiler.formats.group_sizes import check_bits
from optc.compiler.ir.row_blocks import row_blocks

STEPS, LEAST = 40, 0.4
"""Ratios tried: from 1 down to LEAST."""

_SMALLEST_HALF = 2.0**-14  # the least normal number of float16


@dataclass(frozen=True)
class Grid:
    """The representable values of every group of a weight [N, K].

    Attributes:
        scale: float32 [N, G], positive; of either sign where that was asked for (`search`).
        zero: float32 [N, G] of integers; 2^(bits-1) everywhere when symmetric.
        bits, group_size: group_size is K for one group per row.
    """

    scale: Tensor
    zero: Tensor
    bits: int
    group_size: int
    symmetric: bool

    def codes(self, weight: Tensor) -> Tensor:
        """Nearest codes, float32 [N, K] of integers."""
        groups = weight.reshape(weight.shape[0], -1, self.group_size)
        codes = torch.round(groups / self.scale[..., None] + self.zero[..., None])
        return codes.clamp_(0, 2**self.bits - 1).reshape(weight.shape)

    def stored_codes(self, weight: Tensor) -> Tensor:
        """Nearest codes of a weight of any floating type, uint8 [N, K], made a block of rows at a time."""
        if weight.device.type != "cpu":
            return self.codes(weight.float()).to(torch.uint8)
        made = torch.empty(weight.shape, dtype=torch.uint8)
        for begin, end in row_blocks(*weight.shape):
            rows = replace(self, scale=self.scale[begin:end], zero=self.zero[begin:end])
            made[begin:end] = rows.codes(weight[begin:end].float())
        return made

    def values(self, codes: Tensor) -> Tensor:
        """What codes [N, K] stand for, float32 [N, K]."""
        groups = codes.reshape(codes.shape[0], -1, self.group_size)
        return ((groups - self.zero[..., None]) * self.scale[..., None]).reshape(codes.shape)

    def with_scale(self, scale: Tensor) -> Grid:
        """The same grid with other scales (made storable)."""
        return Grid(storable(scale), self.zero, self.bits, self.group_size, self.symmetric)


def storable(scale: Tensor) -> Tensor:
    """Scales as float16 can hold them, in float32, where they are in its normal range: 16 bits on disk."""
    half = scale.to(torch.float16).float()
    return torch.where((scale.abs() >= _SMALLEST_HALF) & torch.isfinite(half), half, scale)


def full_range(weight: Tensor, bits: int, group_size: int, symmetric: bool) -> Grid:
    """The grid that reaches the largest weight of each group; the start of every search.

    Args:
        weight: [N, K], K a multiple of group_size (0: one group per row).
    """
    check_bits(bits)
    size = group_size or weight.shape[1]
    groups = weight.detach().float().reshape(weight.shape[0], -1, size)
    low, high = torch.aminmax(groups, dim=-1)
    return _grid(low, high, bits, size, symmetric)


def search(
    weight: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool,
    gram: Tensor | None = None,
    *,
    steps: int = STEPS,
    least: float = LEAST,
    signed: bool = False,
) -> Grid:
    """The grid of each group with the least error of rounding to nearest.

    Args:
        weight: [N, K].
        gram: [K, K], the inputs' X X^T: the error is that of the group's outputs, ||(w - nearest) X_group||^2. None:
            the squared error of the weights.
        steps, least: ratios of the full range that are tried, from 1 down to `least`.
        signed: symmetric scales are negative where the largest weight of a group is positive, so that the code which has
            no counterpart stands for it, as onnxruntime's own quantizer has it.
    """
    check_bits(bits)
    size = group_size or weight.shape[1]
    weight, blocks = weight.detach(), None if gram is None else _diagonal_blocks(gram, size)
    parts = row_blocks(*weight.shape) if weight.device.type == "cpu" else [(0, len(weight))]
    tried = (bits, size, symmetric, blocks, steps, least, signed)
    found = [_search(weight[begin:end].float(), *tried) for begin, end in parts]
    if len(found) == 1:
        return found[0]
    return replace(
        found[0], scale=torch.cat([grid.scale for grid in found]), zero=torch.cat([grid.zero for grid in found])
    )


def _search(
    weight: Tensor,
    bits: int,
    size: int,
    symmetric: bool,
    blocks: Tensor | None,
    steps: int,
    least: float,
    signed: bool,
) -> Grid:
    groups = weight.reshape(weight.shape[0], -1, size)
    low, high = torch.aminmax(groups, dim=-1)
    ratios = [1.0 - step * (1.0 - least) / max(1, steps - 1) for step in range(steps)]
    factors = torch.tensor(ratios, device=weight.device)[:, None, None]
    tried = _grid(low * factors, high * factors, bits, size, symmetric, signed=signed)  # [steps, N, G]
    best, gap = torch.zeros_like(low, dtype=torch.long), torch.empty_like(groups)
    least_error = torch.full_like(low, torch.inf)
    for step in range(steps):
        error = _error(_rounding(groups, _step(tried, step), gap), blocks)
        better = error < least_error
        least_error = torch.where(better, error, least_error)
        best.masked_fill_(better, step)
    scale, zero = (item.gather(0, best[None])[0] for item in (tried.scale, tried.zero))
    return replace(tried, scale=scale, zero=zero)


def _step(tried: Grid, step: int) -> Grid:
    """One of the grids whose parts are [steps, N, G]."""
    return replace(tried, scale=tried.scale[step], zero=tried.zero[step])


def _rounding(groups: Tensor, grid: Grid, out: Tensor) -> Tensor:
    """What rounding to nearest adds to groups [N, G, size]."""
    scale, low, high = grid.scale[..., None], 0.0, 2.0**grid.bits - 1
    torch.div(groups, scale, out=out)
    if grid.symmetric:  # the zero point is the same everywhere: it moves the limits instead
        half = 2.0 ** (grid.bits - 1)
        out.round_().clamp_(low - half, high - half)
    else:
        zero = grid.zero[..., None]
        out.add_(zero).round_().clamp_(low, high).sub_(zero)
    return out.mul_(scale).sub_(groups)


def _diagonal_blocks(gram: Tensor, size: int) -> Tensor:
    """The blocks [G, size, size] on the diagonal of a [K, K] matrix."""
    count = gram.shape[0] // size
    return torch.stack([gram[g * size : (g + 1) * size, g * size : (g + 1) * size] for g in range(count)]).float()


def _error(gap: Tensor, blocks: Tensor | None) -> Tensor:
    """[N, G], the error of each group from the differences [N, G, size]."""
    if blocks is None:
        return gap.square_().sum(-1)
    by_group = gap.transpose(0, 1)
    return (torch.bmm(by_group, blocks) * by_group).sum(-1).t()


def _grid(low: Tensor, high: Tensor, bits: int, size: int, symmetric: bool, *, signed: bool = False) -> Grid:
    """The grid whose ends are `low` and `high` [N, G]; a group of zeros gets scale 1."""
    if symmetric:
        top = 2.0 ** (bits - 1)
        # The code 0 stands for -top * scale: one step more on the negative side, or of a negative scale on the positive.
        scale = torch.maximum(high / (top - 1), -low / top).clamp(min=0)
        if signed:
            scale = torch.where(high > -low, -torch.maximum(-low / (top - 1), high / top), scale)
        zero = torch.full_like(scale, top)
    else:
        top = 2.0**bits - 1
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = high / top - low / top
        zero = torch.zeros_like(scale)
    scale = storable(torch.where(scale == 0, torch.ones_like(scale), scale))
    if not symmetric:
        zero = torch.round(-low / scale).clamp_(0, top)
    return Grid(scale, zero, bits, size, symmetric)
