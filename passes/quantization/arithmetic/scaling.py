"""Scales that make a weight easier to round: which ones, and how they are written into a program.

linear(x, W) = linear(x / s, W * s): a channel whose input is large gets a large weight, and with it a small
relative error. The scales of AWQ (Lin et al. 2023, https://arxiv.org/abs/2306.00978) are powers of the inputs'
magnitude, searched for the least output error; those of SmoothQuant (Xiao et al. 2022,
https://arxiv.org/abs/2211.10438) balance the ranges of inputs and weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Node

from optc.compiler.analysis.linears import Linear
from optc.compiler.ir.devices import tensor_float_32
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import set_weight
from optc.passes.quantization.arithmetic.folding import Fold
from optc.passes.quantization.arithmetic.grid import search

_ALPHAS = tuple(i / 10 for i in range(1, 11))
_GRID_STEPS = 6
_LIMIT = 1e4  # largest ratio of two scales


def awq_scales(
    weights: Sequence[Tensor], gram: Tensor, fold: Fold, *, bits: int, group_size: int, symmetric: bool
) -> tuple[Tensor, float]:
    """The scales with the least ||(Q(W s) / s - W) X||^2 over all weights, and that error's share of no scaling.

    Candidates are a^alpha and a^alpha / w^(1 - alpha), with a the root mean square of each input channel and w
    the mean magnitude of the weights that read it, relative to their group's largest.

    Args:
        weights: [N, K] each, all that read the input.
        gram: [K, K], X X^T of the inputs.

    Returns:
        scales float32 [free], geometric mean 1; ones when none beats no scaling. The share is 1 then.
    """
    weight = torch.cat([item.float() for item in weights])
    size = group_size or weight.shape[1]
    inputs = _tied(gram.diagonal().clamp(min=0), fold).sqrt()
    groups = weight.abs().reshape(weight.shape[0], -1, size)
    sizes = _tied((groups / groups.amax(-1, keepdim=True).clamp(min=1e-12)).reshape(weight.shape).mean(0), fold)
    plain = _loss(weight, torch.ones_like(inputs), fold, gram, bits, group_size, symmetric)
    best, least = torch.ones_like(inputs), plain
    for alpha in _ALPHAS:
        for scales in (inputs**alpha, inputs**alpha / sizes.clamp(min=1e-6) ** (1 - alpha)):
            candidate = _normal(scales)
            loss = _loss(weight, candidate, fold, gram, bits, group_size, symmetric)
            if loss < least:
                best, least = candidate, loss
    return best, least / plain if plain > 0 else 1.0


def smooth_scales(weights: Sequence[Tensor], largest: Tensor, fold: Fold, alpha: float) -> Tensor:
    """max|x|^alpha / max|w|^(1 - alpha) per free scale, geometric mean 1.

    Args:
        largest: [K], the largest magnitude of each input channel.
    """
    magnitudes = torch.stack([item.float().abs().amax(0) for item in weights]).amax(0)
    inputs, sizes = (_tied(item, fold, "amax").clamp(min=1e-5) for item in (largest, magnitudes))
    return _normal(inputs**alpha / sizes ** (1 - alpha))


def apply_scales(program: Program, readers: Sequence[Linear], fold: Fold, scales: Tensor) -> None:
    """Divide what makes the input and multiply every weight that reads it; `program` is edited.

    Args:
        readers: all linears that read the input, quantized later or not.
        scales: [free], positive.
    """
    per_channel = scales[fold.labels]
    done: set[tuple[Node, int | None]] = set()
    for site in readers:
        assert site.placeholder is not None
        if (site.placeholder, site.index) in done:
            continue
        done.add((site.placeholder, site.index))
        factor = per_channel[:, None] if site.transposed else per_channel
        _multiply(program, site.placeholder, site.index, factor)
    for item in fold.divisions:
        labels = item.labels.to(scales.device)
        factor = torch.where(labels >= 0, 1 / scales[labels.clamp(min=0)], torch.ones_like(scales[:1]))
        tensor = program.weight(_name(program, item.placeholder))
        shape = [1] * (tensor.dim() - (item.index is not None))
        shape[item.axis] = -1
        _multiply(program, item.placeholder, item.index, factor.reshape(shape))


def _multiply(program: Program, placeholder: Node, index: int | None, factor: Tensor) -> None:
    name = _name(program, placeholder)
    old = program.weight(name).detach()
    if index is None:
        set_weight(program, name, (old.float() * factor.to(old.device)).to(old.dtype))
        return
    new = old.clone()
    new[index] = (old[index].float() * factor.to(old.device)).to(old.dtype)
    set_weight(program, name, new)


def _name(program: Program, placeholder: Node) -> str:
    name = program.weight_of(placeholder)
    assert name is not None
    return name


def _tied(values: Tensor, fold: Fold, reduce: str = "mean") -> Tensor:
    """One value per free scale: the mean, or the largest, of the channels that share it."""
    out = torch.zeros(fold.free, dtype=torch.float32)
    return out.scatter_reduce(0, fold.labels, values.float().cpu(), reduce, include_self=False).to(values.device)


def _normal(scales: Tensor) -> Tensor:
    """Scales with geometric mean 1, none more than a factor of 100 from it."""
    logs = torch.log(scales.clamp(min=1e-12))
    bound = math.log(_LIMIT) / 2
    return torch.exp((logs - logs.mean()).clamp(-bound, bound))


def _loss(
    weight: Tensor, scales: Tensor, fold: Fold, gram: Tensor, bits: int, group_size: int, symmetric: bool
) -> float:
    per_channel = scales[fold.labels]
    scaled = weight * per_channel
    inputs = gram / (per_channel[:, None] * per_channel)
    grid = search(scaled, bits, group_size, symmetric, inputs, steps=_GRID_STEPS, least=0.7)
    gap = grid.values(grid.codes(scaled)) / per_channel - weight
    with tensor_float_32():  # a search compares errors of some percent
        return float(((gap @ gram) * gap).sum())
