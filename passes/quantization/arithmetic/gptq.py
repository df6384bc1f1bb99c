"""GPTQ: rounding column by column, each column's error made up for by the columns still to come.

Frantar et al. 2022, https://arxiv.org/abs/2210.17323. The Hessian of ||(W - Q) X||^2 is the Gram matrix
H = X X^T of the inputs, shared by all rows. Columns are taken in falling order of diag(H) ("act-order"), with
the grids of all groups fixed beforehand ("static groups"), so that the stored order never changes.

The errors are moved by the factor of H itself rather than by that of its inverse, which gives the same codes (LDLQ of
Chee et al. 2023, https://arxiv.org/abs/2307.13304, theorem 6): with H = M D M^T, M upper triangular with ones on its
diagonal, column k is rounded to the grid's number nearest to w_k + sum over j < k of (w_j - q_j) M[j, k]. That takes one
Cholesky factorization and no inverse, a quarter of the work.
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
_FACTOR_BLOCK = 512
_EXACT = 8192
"""Columns up to which a CPU factors in float64; beyond it takes too long."""
_ROWS = 4096  # on a CPU a block of this many rows of the weight fits the cache
_MOST_DAMPING = 1.0
_ROUNDER = BlockRounder()  # one for the process: it keeps what it recorded for a GPU


@dataclass(frozen=True)
class Factor:
    """What GPTQ needs of a Gram matrix, for all weights that read the same input.

    Attributes:
        order: [K], columns in falling order of importance.
        upper: [K, K], M of the damped, permuted H = M D M^T: upper triangular, its diagonal is 1.
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
    turned = order.flip(0)  # a lower factor of H turned around is an upper one of H
    permuted = gram.index_select(0, turned).index_select(1, turned)
    exact = gram.device.type == "cpu" and len(gram) <= _EXACT
    permuted = permuted.double() if exact else permuted.float()
    permuted.diagonal()[dead[turned]] = 1.0
    lower, damping = damped_cholesky(permuted, damping, where)
    del permuted
    upper = lower.div_(lower.diagonal().clone()).float().flip(0, 1)
    return Factor(order, upper, damping, dead)


def damped_cholesky(matrix: Tensor, damping: float, where: str) -> tuple[Tensor, float]:
    """(lower Cholesky factor of the matrix with damping * mean(diagonal) added, the damping that it took).

    The matrix itself gets the damping: a copy may be gigabytes.

    Raises:
        InputError: not positive definite even with damping 1.
    """
    diagonal = matrix.diagonal().clone()
    mean = max(float(diagonal.mean()), 1e-30)
    damping = max(damping, 1e-6)
    while True:
        matrix.diagonal().copy_(diagonal + damping * mean)
        lower = _cholesky(matrix)
        if lower is not None:
            return lower, damping
        if damping >= _MOST_DAMPING:
            raise _indefinite(damping, where)
        damping = min(_MOST_DAMPING, damping * 10)


def _cholesky(matrix: Tensor) -> Tensor | None:
    """The lower Cholesky factor of a symmetric matrix; None, and the matrix as it was, where it has none.

    On a CPU it takes the matrix's place, in blocks of columns: twice as fast as MKL's, and no second matrix.
    """
    if matrix.device.type != "cpu":
        lower, info = torch.linalg.cholesky_ex(matrix)
        return lower if not int(info) and bool(torch.isfinite(lower).all()) else None
    squares = [(start, start + _FACTOR_BLOCK) for start in range(0, len(matrix), _FACTOR_BLOCK)]
    kept = [matrix[start:end, start:end].clone() for start, end in squares]
    for start, end in squares:
        matrix[start:, start:end].addmm_(matrix[start:, :start], matrix[start:end, :start].t(), alpha=-1)
        lower, info = torch.linalg.cholesky_ex(matrix[start:end, start:end])
        if int(info) or not bool(torch.isfinite(lower).all()):
            for (first, last), square in zip(squares, kept, strict=True):  # what is above them was not touched
                matrix[first:last, first:last] = square
                matrix[last:, first:last] = matrix[first:last, last:].t()
            return None
        matrix[start:end, start:end] = lower
        below = torch.linalg.solve_triangular(lower, matrix[end:, start:end].t(), upper=False)
        matrix[end:, start:end] = below.t()
    return matrix.tril_()


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
    rows = _ROWS if work.device.type == "cpu" else work.shape[1]
    codes = torch.empty_like(work)
    for start in range(0, columns, _BLOCK):
        end = min(start + _BLOCK, columns)
        upper = factor.upper[start:end, start:end].contiguous()
        for first in range(0, work.shape[1], rows):
            part = slice(first, first + rows)
            block = work[start:end, part].contiguous()
            # The columns before hold their errors by now.
            target = torch.addmm(block, factor.upper[:start, start:end].t(), work[:start, part])
            grids = (scale[group[start:end], part], zero[group[start:end], part])
            codes[start:end, part], work[start:end, part] = _ROUNDER(block, target, upper, *grids, 2.0**grid.bits - 1)
    del work
    result = torch.empty_like(codes)
    result[order] = codes
    del codes
    return result.t().contiguous()


def output_error(weight: Tensor, values: Tensor, gram: Tensor) -> tuple[float, float]:
    """(||(W - Q) X||^2, ||W X||^2) from the Gram matrix of X."""
    return output_energy(weight.float() - values.float(), gram), output_energy(weight, gram)


def output_energy(weight: Tensor, gram: Tensor) -> float:
    """||W X||^2 from the Gram matrix of X."""
    weight, gram = weight.float(), gram.float()
    with tensor_float_32():  # figures for a report
        return float((weight @ gram * weight).sum())


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
    lower, _ = damped_cholesky(gram.double(), max(damping, 1e-3), where)  # a copy: `gram` is float32
    correction = torch.cholesky_solve((weight.double() @ drift.double()).t(), lower).t()
    return (weight.double() + strength * correction).float()
