"""GPTQ against a slow spelling of the paper's algorithm, and the refinements against closed forms."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from optc.compiler.diagnostics import InputError
from optc.passes.quantization.arithmetic import gptq
from optc.passes.quantization.arithmetic.gptq import compensated, factorize, output_error, solve
from optc.passes.quantization.arithmetic.grid import Grid, full_range, search
from optc.passes.quantization.arithmetic.refine import descend, refit


def _problem(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """(weight, inputs [n, K] with correlated columns, gram)."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    mixing = torch.randn(columns, columns, generator=generator) * 0.4 + torch.eye(columns)
    x = torch.randn(4 * columns, columns, generator=generator) @ mixing
    return weight, x, x.t() @ x / len(x)


def _slow_gptq(weight: Tensor, gram: Tensor, grid: Grid, damping: float, act_order: bool) -> Tensor:
    """Optimal brain quantization in one fixed order, with the inverse Hessian downdated column by column."""
    work = weight.double().clone()
    columns = work.shape[1]
    order = torch.argsort(gram.diagonal(), descending=True, stable=True) if act_order else torch.arange(columns)
    damped = gram.double() + damping * gram.diagonal().double().mean() * torch.eye(columns).double()
    inverse = torch.linalg.inv(damped)
    codes = torch.zeros_like(work)
    left = order.tolist()
    top = 2.0**grid.bits - 1
    for column in order.tolist():
        scale = grid.scale[:, column // grid.group_size].double()
        zero = grid.zero[:, column // grid.group_size].double()
        codes[:, column] = torch.round(work[:, column] / scale + zero).clamp(0, top)
        error = (work[:, column] - (codes[:, column] - zero) * scale) / inverse[column, column]
        for other in left:
            work[:, other] -= error * inverse[column, other]
        inverse = inverse - torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        left.remove(column)
    return codes


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(("columns", "group_size"), [(24, 8), (160, 32), (16, 16)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_equals_the_slow_algorithm(columns: int, group_size: int, symmetric: bool, act_order: bool) -> None:
    weight, _, gram = _problem(6, columns)
    grid = full_range(weight, 3, group_size, symmetric)
    factor = factorize(gram, 0.01, act_order=act_order)
    assert factor.damping == 0.01
    expected = _slow_gptq(weight, gram, grid, 0.01, act_order)
    # Float32 sums may fall on the other side of a half; nearly all codes are the same.
    same = (solve(weight, factor, grid).double() == expected).double().mean()
    assert float(same) > 0.995


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_output_error_falls(bits: int) -> None:
    weight, x, gram = _problem(16, 64)
    grid = search(weight, bits, 32, True)
    nearest = grid.codes(weight)
    codes = solve(weight, factorize(gram, 0.01), grid)
    before, whole = output_error(weight, grid.values(nearest), gram)
    after, _ = output_error(weight, grid.values(codes), gram)
    assert after < 0.8 * before
    # The Gram matrix's error is the error of the outputs.
    gap = ((weight - grid.values(codes)) @ x.t()).square().sum() / len(x)
    assert after == pytest.approx(float(gap), rel=1e-3)
    assert whole == pytest.approx(float((weight @ x.t()).square().sum() / len(x)), rel=1e-3)


def test_columns_without_input_become_zero() -> None:
    weight, _, gram = _problem(4, 16)
    gram[3], gram[:, 3] = 0, 0
    grid = full_range(weight, 4, 8, False)
    factor = factorize(gram, 0.01)
    assert factor.dead.tolist() == [column == 3 for column in range(16)]
    codes = solve(weight, factor, grid)
    assert torch.equal(grid.values(codes)[:, 3], torch.zeros(4))


def test_damping_rises_until_it_can_be_factored() -> None:
    x = torch.randn(2, 12, generator=torch.Generator().manual_seed(0))
    factor = factorize(x.t() @ x - 1e-3 * torch.eye(12), 0.0)  # rank 2, and slightly indefinite
    assert factor.damping > 1e-4
    assert bool(torch.isfinite(factor.upper).all())


def test_factors_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the matrix's place, which is as it was where it has no factor."""
    monkeypatch.setattr(gptq, "_FACTOR_BLOCK", 16)
    _, _, gram = _problem(1, 50)
    exact = gram.double() + 1e-3 * torch.eye(50).double()
    torch.testing.assert_close(gptq._cholesky(exact.clone()), torch.linalg.cholesky(exact), rtol=1e-10, atol=1e-12)
    for place in (3, 40):
        bad = exact.clone()
        bad[place, place] = -1.0
        work = bad.clone()
        assert gptq._cholesky(work) is None
        assert torch.equal(work, bad)


def test_float32_beyond_some_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, gram = _problem(1, 64)
    exact = factorize(gram, 0.01).upper
    monkeypatch.setattr(gptq, "_EXACT", 63)
    found = factorize(gram, 0.01).upper
    assert not torch.equal(found, exact)
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-4)


def test_hopeless_matrices_are_named() -> None:
    with pytest.raises(InputError, match="NaN or infinite") as caught:
        factorize(torch.full((4, 4), float("nan")), 0.01, where="layer 3")
    assert caught.value.where == "layer 3"
    matrix = torch.eye(4)
    matrix[0, 1] = matrix[1, 0] = 50.0
    with pytest.raises(InputError, match="not positive definite"):
        factorize(matrix, 0.01)


def test_descent_never_rises_and_reaches_a_local_optimum() -> None:
    weight, _, gram = _problem(3, 4)
    grid = full_range(weight, 2, 4, False)
    codes = grid.codes(weight)
    errors = [output_error(weight, grid.values(codes), gram)[0]]
    for _ in range(6):
        codes = descend(weight, gram, grid, codes)
        errors.append(output_error(weight, grid.values(codes), gram)[0])
    assert all(after <= before + 1e-6 for before, after in itertools.pairwise(errors))
    for row, column in itertools.product(range(3), range(4)):
        for code in range(4):
            other = codes.clone()
            other[row, column] = code
            assert output_error(weight, grid.values(other), gram)[0] >= errors[-1] - 1e-6


def test_descent_over_several_blocks() -> None:
    weight, _, gram = _problem(8, 300)
    grid = search(weight, 3, 100, True)
    codes = solve(weight, factorize(gram, 0.01), grid)
    before = output_error(weight, grid.values(codes), gram)[0]
    after = output_error(weight, grid.values(descend(weight, gram, grid, codes)), gram)[0]
    assert after < before


@pytest.mark.parametrize("symmetric", [True, False])
def test_refitted_scales_are_the_least_squares_ones(symmetric: bool) -> None:
    weight, x, gram = _problem(5, 32)
    grid = full_range(weight, 4, 8, symmetric)
    codes = grid.codes(weight)
    found = refit(weight, gram, grid, codes)
    for row in range(5):
        units = (codes[row].reshape(4, 8) - grid.zero[row][:, None]).double()
        design = torch.stack([x.double()[:, 8 * g : 8 * g + 8] @ units[g] for g in range(4)], 1)
        best = torch.linalg.lstsq(design, x.double() @ weight[row].double()).solution
        assert torch.allclose(found.scale[row].double(), best, rtol=2e-3)


def test_compensation_is_least_squares() -> None:
    weight, x0, _ = _problem(6, 20)
    x = x0 + 0.3 * torch.randn(x0.shape, generator=torch.Generator().manual_seed(5))
    gram, drift = x.t() @ x / len(x), (x0 - x).t() @ x / len(x)
    found = compensated(weight, gram, drift, 1.0, 1e-6, "")
    # The ridge as rows of their own: they hold the solution near the weight.
    ridge = (1e-3 * float(gram.diagonal().mean()) * len(x)) ** 0.5 * torch.eye(20).double()
    inputs = torch.cat([x.double(), ridge])
    targets = torch.cat([x0.double() @ weight.double().t(), ridge @ weight.double().t()])
    best = torch.linalg.lstsq(inputs, targets).solution.t()
    assert torch.allclose(found.double(), best, atol=1e-4)
    half = compensated(weight, gram, drift, 0.5, 1e-6, "")
    assert torch.allclose(half, (found + weight) / 2, atol=1e-5)
