"""The Triton kernel of `select_rows` against the reference: in the interpreter, and with real types on the GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpreted import DEVICE, FLOATS, HAS_GPU, ON_GPU

from optc.compiler.kernels.cuda.rows import launch
from optc.compiler.kernels.cuda.select_rows import SELECT_ROWS, accepts

INDICES = torch.tensor([[4, 0, 6, 4]], device=DEVICE)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("columns", [1, 96, 1024, 1500])
@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_it_selects_what_the_reference_does(dtype: torch.dtype, columns: int, factor: float) -> None:
    rows = torch.randn(7, columns, generator=torch.Generator().manual_seed(columns)).to(DEVICE, dtype)
    for indices in (INDICES, INDICES[0, 1:2], INDICES[:, :0]):
        found = launch.select_rows(rows, indices, factor=factor)
        expected = SELECT_ROWS.spec.reference(rows, indices, factor=factor)
        assert expected.shape == (*indices.shape, columns)
        assert torch.equal(found, expected)


def test_rows_of_a_wider_tensor_and_indices_that_are_not_neighbours() -> None:
    wide = torch.randn(7, 300, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    indices = torch.tensor([3, 9, 1, 9, 5], device=DEVICE)[::2]
    assert torch.equal(launch.select_rows(wide[:, 100:200], indices), wide[indices, 100:200])


def test_a_row_that_there_is_not_becomes_nan() -> None:
    rows = torch.ones(3, 40, device=DEVICE)
    found = launch.select_rows(rows, torch.tensor([2, 3, -1, 0], device=DEVICE))
    assert found.isnan().all(1).tolist() == [False, True, True, False]
    assert torch.equal(found[[0, 3]], rows[:2])


def test_says_what_it_takes() -> None:
    rows, indices = torch.zeros(3, 8), torch.zeros(2, dtype=torch.int64)
    cases: list[tuple[Any, str | None]] = [
        ((rows, indices), None),
        ((rows[None], indices), "the elements of a row are not neighbours"),
        ((rows.t(), indices), "the elements of a row are not neighbours"),
        ((rows, indices.int()), "rows are named by torch.int32; the kernel takes torch.int64"),
        ((rows.double(), indices), "rows of type float64; the kernel takes bfloat16, float16, float32"),
    ]
    assert [accepts(args, {}) for args, _ in cases] == [reason for _, reason in cases]


@pytest.mark.parametrize("mark", [pytest.param(None, marks=ON_GPU)])
def test_op_runs_the_kernel(mark: None) -> None:
    """A row that there is not would be an error of torch's."""
    assert HAS_GPU
    rows = torch.ones(3, 40, device=DEVICE)
    assert torch.ops.optc.select_rows(rows, torch.tensor([3], device=DEVICE)).isnan().all()
