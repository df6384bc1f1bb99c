"""The Triton kernel of `fused_norm` against the reference: in the interpreter, and with real types on the GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpreted import DEVICE, FLOATS, HAS_GPU, ON_GPU
from torch import Tensor

from optc.compiler.kernels.cuda.fused_norm import FUSED_NORM, accepts
from optc.compiler.kernels.cuda.norm import launch

OPTIONS: dict[str, dict[str, Any]] = {
    "rms, residual": {"norm": "rms", "weight": True, "residual": True},
    "rms without a weight": {"norm": "rms"},
    "layer": {"norm": "layer", "weight": True, "bias": True},
    "layer, factor, residual": {"norm": "layer", "weight": True, "residual": True, "factor": 0.22},
    "factor and residual": {"factor": -1.5, "residual": True},
}


def arguments(
    rows: int,
    columns: int,
    dtype: torch.dtype,
    *,
    weight: bool = False,
    bias: bool = False,
    residual: bool = False,
    norm: str = "",
    factor: float = 1.0,
) -> tuple[tuple[Tensor | None, ...], dict[str, Any]]:
    """Of the op; rows far from mean 0, and a weight in float32, as folded weights are."""
    generator = torch.Generator().manual_seed(columns)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    x = (normal(rows, columns) * 3 + 5).to(dtype)
    scale, shift = normal(columns) if weight else None, normal(columns).to(dtype) if bias else None
    other = normal(rows, columns).to(dtype) if residual else None
    return (x, scale, shift, other), {"norm": norm, "eps": 1e-5, "factor": factor}


def check(found: Tensor, args: tuple[Tensor | None, ...], knobs: dict[str, Any]) -> None:
    """Against the reference in float32: one rounding of the result apart."""
    wide = [None if item is None else item.float() for item in args]
    expected = FUSED_NORM.spec.reference(*wide, **knobs)
    x = args[0]
    assert x is not None
    assert (found.dtype, found.shape) == (x.dtype, x.shape)
    rounding = 0.0 if x.dtype is torch.float32 else torch.finfo(x.dtype).eps
    assert float((found.float() - expected).abs().max()) <= (FUSED_NORM.tolerance + rounding) * float(
        expected.abs().max()
    )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("columns", [1, 96, 1000, 2048])
@pytest.mark.parametrize("option", OPTIONS)
def test_it_computes_what_the_reference_does(option: str, columns: int, dtype: torch.dtype) -> None:
    args, knobs = arguments(3, columns, dtype, **OPTIONS[option])
    check(launch.fused_norm(*args, **knobs), args, knobs)


def test_rows_of_a_part_of_a_wider_tensor() -> None:
    """And axes in front of the columns."""
    args, knobs = arguments(6, 96, torch.float32, **OPTIONS["rms, residual"])
    x, weight, _, residual = args
    assert x is not None
    assert residual is not None
    wide = torch.cat([residual, x, residual], 1)[None]
    found = launch.fused_norm(wide[..., 96:192], weight, None, residual[None], **knobs)
    assert found.shape == (1, 6, 96)
    check(found[0], args, knobs)


def test_columns_that_are_not_neighbours() -> None:
    args, knobs = arguments(6, 96, torch.float32, **OPTIONS["layer, factor, residual"])
    x, weight, _, residual = args
    assert x is not None
    assert residual is not None
    check(launch.fused_norm(x.t().contiguous().t(), weight, None, residual.t().contiguous().t(), **knobs), args, knobs)


def test_no_rows() -> None:
    args, knobs = arguments(0, 96, torch.float32, norm="rms")
    assert launch.fused_norm(*args, **knobs).shape == (0, 96)


def test_numbers_that_are_not_finite_stay_so() -> None:
    args, knobs = arguments(3, 96, torch.float32, **OPTIONS["rms, residual"])
    x = args[0]
    assert x is not None
    x[1, 5] = float("nan")
    found = launch.fused_norm(*args, **knobs)
    assert torch.isfinite(found).all(1).tolist() == [True, False, True]


def test_says_what_it_takes() -> None:
    row, wide = torch.zeros(2, 64), torch.zeros(2, 16400)
    every = torch.zeros(64)
    cases: list[tuple[Any, dict[str, Any], str | None]] = [
        ((row, every, None, row), {"norm": "rms"}, None),
        ((row, every.double(), None, row), {"norm": "rms"}, None),
        ((row, None, None, None), {"norm": "group"}, "no kernel has the norm 'group'"),
        ((wide, None, None, None), {}, "16400 columns; the kernel takes up to 16384"),
        ((row, every[:1], None, None), {}, "a weight or bias of the norm is not of one row's shape"),
        ((row, row.new_zeros(128)[::2], None, None), {}, "a weight or bias of the norm is not contiguous"),
        ((row, None, None, row.half()), {}, "a residual of torch.float16 for rows of torch.float32"),
        ((row, None, None, row[:1]), {}, "a residual of [1, 64] for rows of [2, 64]"),
        ((row.double(), None, None, None), {}, "rows of type float64; the kernel takes bfloat16, float16, float32"),
    ]
    assert [accepts(args, knobs) for args, knobs, _ in cases] == [reason for *_, reason in cases]


@pytest.mark.parametrize("mark", [pytest.param(None, marks=ON_GPU)])
def test_op_runs_the_kernel(mark: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA tensors; what is refused goes to the reference."""
    assert HAS_GPU
    called: list[torch.dtype] = []
    run = launch.fused_norm
    monkeypatch.setattr(
        launch, "fused_norm", lambda x, *args, **knobs: called.append(x.dtype) or run(x, *args, **knobs)
    )
    for dtype in (torch.bfloat16, torch.float64):
        args, knobs = arguments(3, 4096, dtype, **OPTIONS["rms, residual"])
        check(torch.ops.optc.fused_norm(*args, **knobs), args, knobs)
    assert called == [torch.bfloat16]
