"""Grouped experts on the CPU against every expert on every token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from optc.compiler.kernels.cpu.fused_experts import FUSED_EXPERTS, accepts
from optc.compiler.kernels.cpu.library import build_library
from optc.compiler.kernels.kernel import kernels_for
from optc.compiler.ops.library import reference

pytestmark = pytest.mark.slow  # the first build takes 10 s; later ones come from the user's cache


@pytest.fixture(scope="module")
def kernel() -> Callable[..., Tensor]:
    torch.ops.load_library(str(build_library(kernels_for("cpu"))))
    return torch.ops.optc.fused_experts.default


def _inputs(tokens: int, experts: int = 5, slots: int = 2, dtype: torch.dtype = torch.float32) -> list[Any]:
    generator = torch.Generator().manual_seed(tokens)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    indices = torch.stack([torch.randperm(experts - 1, generator=generator)[:slots] for _ in range(tokens)])
    weights = torch.rand(tokens, slots, generator=generator)
    return [draw(tokens, 24), draw(experts, 32, 24) / 5, draw(experts, 20, 16) / 4, indices, weights, None]


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu", ""])
@pytest.mark.parametrize("tokens", [1, 2, 37])
def test_kernel_equals_reference(kernel: Callable[..., Tensor], tokens: int, activation: str) -> None:
    """The last expert is chosen by nobody: NaN in its weights changes nothing."""
    inputs, knobs = _inputs(tokens), {"activation": activation, "gated": True}
    expected = reference("fused_experts")(*inputs, **knobs)
    for weight in inputs[1:3]:
        weight[-1] = torch.nan
    found = kernel(*inputs, **knobs)
    assert float((found - expected).abs().max()) <= FUSED_EXPERTS.tolerance * float(expected.abs().max())


def test_the_same_expert_twice_and_rows_that_are_not_whole(kernel: Callable[..., Tensor]) -> None:
    inputs = _inputs(9)
    inputs[3][:, 1] = inputs[3][:, 0]
    inputs[0] = inputs[0].t().contiguous().t()
    expected = reference("fused_experts")(*inputs, activation="silu", gated=True)
    torch.testing.assert_close(kernel(*inputs, activation="silu", gated=True), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gated", [False, True])
def test_calls_of_other_programs(kernel: Callable[..., Tensor], gated: bool, dtype: torch.dtype) -> None:
    """Those of a program for a GPU, whose passes run on a CPU: with a residual, in 16 bits, without a gate."""
    x, up, down, indices, weights, _ = _inputs(7, dtype=dtype)
    up = up if gated else up[:, :16].contiguous()
    residual = torch.randn(7, 20, generator=torch.Generator().manual_seed(1)).to(dtype)
    given, knobs = (x, up, down, indices, weights, residual), {"activation": "silu", "gated": gated}
    expected = reference("fused_experts")(*given, **knobs)
    found = kernel(*given, **knobs)
    assert found.dtype is dtype
    torch.testing.assert_close(found, expected, atol=1e-5 if dtype is torch.float32 else 1e-2, rtol=1e-2)


def test_says_what_it_takes() -> None:
    knobs = {"activation": "silu", "gated": True}
    assert accepts(_inputs(3), knobs) is None
    assert accepts(_inputs(3), {"activation": "silu"}) == "experts have a gate, and no residual behind them"
    assert "torch.bfloat16" in str(accepts(_inputs(3, dtype=torch.bfloat16), knobs))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({1: torch.zeros(5, 30, 24)}, "do not fit"),
        ({3: torch.zeros(3, 2, dtype=torch.int32)}, "indices must be int64"),
        ({4: torch.zeros(3, 1)}, r"must be \[T, S\]"),
    ],
)
def test_other_inputs_are_refused(kernel: Callable[..., Tensor], changes: dict[int, Tensor], words: str) -> None:
    inputs = _inputs(3)
    for index, value in changes.items():
        inputs[index] = value
    with pytest.raises(RuntimeError, match=words):
        kernel(*inputs, activation="silu", gated=True)
