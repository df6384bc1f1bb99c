"""GPTQ: rounding column by column, each column's error made up for by the columns still to come.

Frantar et al. 2022, https://arxiv.org/abs/2210.17323. The Hessian of ||(W - Q) X||^2 is the Gram matrix
H = X X^T of the inputs, shared by all rows. Columns are taken in falling order of diag(H) ("act-order"), with
the grids of all groups fixed beforehand ("static groups"), so that the stored order never changes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from optc.compiler.diagnostics import InputError
from optc.compiler.ir.devices import tensor_float_32
from optc.passes.quantization.arithmetic.column_blocks import BlockRounder
from optc.passes.quantization.arithmetic.grid import Grid

_BLOCK = 128
_MOST_DAMPING = 1.0
_ROUNDER = BlockRounder()  # one for the process: it keeps what it recorded for a GPU


@dataclass(frozen=True)
class Factor:
    """What GPTQ needs of a Gram matrix, for all weights that read the same input.

    Attributes:
        order: [K], columns in falling order of importance.
        upper: [K, K], the upper Cholesky factor of the inverse of the damped, permuted H.
        damping: the share of mean(diag H) that was added to the diagonal.
        dead: [K] bool, columns whose input was always 0.
    """

    order: Tensor
    upper: Tensor
    damping: float
    dead: Tensor


def factorize(gram: Tensor, damping: float, *, act_order: bool = True, where: str = "") -> Factor:
    """Factor a Gram matrix [K, K]; the damping rises tenfold until the matrix is positive definite.

    Raises:
        InputError: it holds NaN or infinity, or stays indefinite at damping 1.
    """
    diagonal = gram.diagonal()
    if not bool(torch.isfinite(diagonal).all()):
        raise InputError(
            "the calibration gave activations that are NaN or infinite",
            where=where,
            remedy="use --dtype fp32 or bf16, and look at the model's outputs on the calibration text",
        )
    dead = diagonal <= 0
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(len(gram))
    order = order.to(gram.device)
    permuted = gram[order][:, order].double() if gram.device.type == "cpu" else gram[order][:, order].float()
    permuted.diagonal()[dead[order]] = 1.0
    lower, damping = damped_cholesky(permuted, damping, where)
    upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    while int(info) and damping < _MOST_DAMPING:  # the inverse may fail where the matrix did not
        lower, damping = damped_cholesky(permuted, min(_MOST_DAMPING, damping * 10), where)
        upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if int(info):
        raise _indefinite(damping, where)
    return Factor(order, upper.float(), damping, dead)


def damped_cholesky(matrix: Tensor, damping: float, where: str) -> tuple[Tensor, float]:
    """(lower Cholesky factor of the matrix with damping * mean(diagonal) added, the damping that it took).

    Raises:
        InputError: not positive definite even with damping 1.
    """
    mean = max(float(matrix.diagonal().mean()), 1e-30)
    damping = max(damping, 1e-6)
    while True:
        damped = matrix.clone()
        damped.diagonal().add_(damping * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        if not int(info) and bool(torch.isfinite(lower).all()):
            return lower, damping
        if damping >= _MOST_DAMPING:
            raise _indefinite(damping, where)
        damping = min(_MOST_DAMPING, damping * 10)


def _indefinite(damping: float, where: str) -> InputError:
    return InputError(
        "the Gram matrix of the calibration inputs is not positive definite",
        where=where,
        why=f"not even with damping {damping:g}",
        remedy="calibrate with more text",
    )


def solve(weight: Tensor, factor: Factor, grid: Grid) -> Tensor:
    """Codes, float32 [N, K] of integers, for a weight [N, K] on a fixed grid."""
    columns = weight.shape[1]
    order = factor.order
    work = weight.detach().float().clone()
    work[:, factor.dead] = 0
    work = work[:, order].t().contiguous()  # [K, N]: a column is a row in memory
    group = order // grid.group_size
    scale, zero = grid.scale.t().contiguous(), grid.zero.t().contiguous()  # [G, N]
    codes = torch.empty_like(work)
    for start in range(0, columns, _BLOCK):
        end = min(start + _BLOCK, columns)
        grids = (scale[group[start:end]], zero[group[start:end]])
        rounded, errors = _ROUNDER(work[start:end], factor.upper[start:end, start:end], *grids, 2.0**grid.bits - 1)
        codes[start:end] = rounded
        if end < columns:
            work[end:].addmm_(factor.upper[start:end, end:].t(), errors, alpha=-1)
    result = torch.empty_like(codes)
    result[order] = codes
    return result.t().contiguous()


def output_error(weight: Tensor, values: Tensor, gram: Tensor) -> tuple[float, float]:
    """(||(W - Q) X||^2, ||W X||^2) from the Gram matrix of X."""
    weight, gram = weight.float(), gram.float()
    gap = weight - values.float()
    with tensor_float_32():  # figures for a report
        return float((gap @ gram * gap).sum()), float((weight @ gram * weight).sum())


def relative(pair: tuple[float, float]) -> float:
    """The relative squared error of `output_error`; 0 for a weight whose output is 0."""
    return pair[0] / pair[1] if pair[1] > 0 and math.isfinite(pair[1]) else 0.0


def compensated(weight: Tensor, gram: Tensor, drift: Tensor, strength: float, damping: float, where: str) -> Tensor:
    """The weight [N, K] that, on inputs moved by earlier quantization, gives what `weight` gave on the clean ones.

    Least squares: W + strength * W D G^-1 with G = X X^T of the moved inputs X and D = (X0 - X) X^T. This is the
    propagation of quantization errors of Arai and Ichikawa 2025, https://arxiv.org/abs/2504.09629.

    Args:
        gram, drift: [K, K]; `drift` as the mean over the same rows as `gram`.
        damping: share of mean(diag G) on its diagonal.
    """
    lower, _ = damped_cholesky(gram.double(), max(damping, 1e-3), where)
    correction = torch.cholesky_solve((weight.double() @ drift.double()).t(), lower).t()
    return (weight.double() + strength * correction).float()
