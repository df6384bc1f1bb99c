"""The kernel that rounds a block of columns, held to the same by operations of torch."""

from __future__ import annotations

import pytest
import torch
from interpreted import DEVICE, HAS_GPU, ON_GPU
from torch import Tensor

from optc.compiler.kernels.cuda.gptq import launch
from optc.passes.quantization.arithmetic.column_blocks import round_by_columns
from optc.passes.quantization.arithmetic.gptq import factorize, solve
from optc.passes.quantization.arithmetic.grid import full_range


def _on_device(block: Tensor, target: Tensor, upper: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
    there = [item.to(DEVICE) for item in (block, target, upper, scale, zero)]
    codes, gaps = launch.round_block(there[0], there[1], there[2], there[3], there[4], 7.0)
    return codes.cpu(), gaps.cpu()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("count", "rows"), [(16, 21), (12, 16), (1, 3)])
def test_codes_and_gaps(count: int, rows: int, symmetric: bool) -> None:
    """All of them alike but for a code whose number lies as near to its neighbour."""
    generator = torch.Generator().manual_seed(count)
    block = torch.randn(count, rows, generator=generator)
    upper = torch.eye(count) + torch.randn(count, count, generator=generator).triu(1) / 3
    grid = full_range(torch.randn(rows, count, generator=generator), 3, 0, symmetric)
    scale, zero = (item.t().expand(count, rows).contiguous() for item in (grid.scale, grid.zero))
    target = block + torch.randn(count, rows, generator=generator) / 10
    codes, gaps = _on_device(block, target, upper, scale, zero)
    expected, missing = round_by_columns(block, target.clone(), upper, scale, zero, 7.0)
    assert expected.unique().numel() > 4 or count == 1
    alike = (codes == expected).all(0)  # a code that differs changes all that follow in its row
    assert float(alike.double().mean()) > 0.9
    torch.testing.assert_close(gaps[:, alike], missing[:, alike], rtol=1e-5, atol=1e-5)


def test_halves_go_to_the_even_code_and_codes_stay_in_the_grid() -> None:
    wanted = torch.tensor([[-9.0, -0.5, 0.5, 1.5, 2.5, 6.5, 7.4, 1e9]])
    ones = torch.ones_like(wanted)
    codes, gaps = _on_device(wanted, wanted, torch.eye(1), ones, 0 * ones)
    assert codes.tolist() == [[0.0, 0.0, 0.0, 2.0, 2.0, 6.0, 7.0, 7.0]]
    assert torch.equal(gaps, wanted - codes)


@pytest.mark.parametrize("shape", [(4096, 4096), (640, 1376)])
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=ON_GPU)])
def test_a_whole_weight_loses_as_little_as_on_the_cpu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    rows, columns = shape
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator, dtype=dtype)
    inputs = torch.randn(2 * columns, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    gram = inputs.t() @ inputs / len(inputs)
    grid = full_range(weight, 4, 32, True)
    errors = []
    for device in (torch.device("cpu"), DEVICE):
        there = full_range(weight.to(device), 4, 32, True)
        codes = solve(weight.to(device), factorize(gram.to(device), 0.01), there).cpu()
        gap = weight - grid.values(codes)
        errors.append(float((gap @ gram * gap).sum()))
    assert errors[1] == pytest.approx(errors[0], rel=1e-2)
    assert HAS_GPU
