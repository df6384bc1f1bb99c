"""Linears whose tokens are rounded to E4M3, against the reference: in the interpreter, and with real types on the GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpreted import DEVICE, FLOATS, ON_GPU
from torch import Tensor

from optc.compiler.kernels.cuda.fused_linear import FUSED_LINEAR, accepts
from optc.compiler.kernels.cuda.linear import launch
from optc.compiler.kernels.cuda.linear.call import Linear
from optc.compiler.kernels.cuda.linear.configurations import tables
from optc.compiler.kernels.cuda.linear.rounded_tokens import multiplies_codes, product_of_codes, rounded
from optc.compiler.ops.packed.cuda import normalize, pack_float, round_tokens

NORMS = ("", "rms", "layer")
COLUMNS = 96
MANY = tables().limits["fp8"]["product"] + 6
"""Tokens that are left to cuBLAS."""


def call(tokens: int, norm: str = "", *, rows: int = 48, gated: bool = False, dtype: torch.dtype) -> Linear:
    generator = torch.Generator().manual_seed(tokens)

    def normal(*shape: int) -> Tensor:
        values = torch.randn(shape, generator=generator)
        return (values * torch.exp(torch.randn(shape, generator=generator))).to(dtype).to(DEVICE)

    codes = torch.randn((rows, COLUMNS), generator=generator).to(torch.float8_e4m3fn)
    packed = pack_float(codes, torch.rand((rows, 1), generator=generator).to(dtype))
    return Linear(
        normal(tokens, COLUMNS), packed.weight.to(DEVICE), packed.scale.to(DEVICE), None,
        normal(COLUMNS) if norm else None, normal(COLUMNS) if norm == "layer" else None, normal(rows),
        normal(tokens, rows // 2 if gated else rows), norm, 1e-5, "silu" if gated else "", gated, "fp8", 0, "fp8",
    )  # fmt: skip


def arguments(linear: Linear) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """As the op takes them."""
    names = ("norm", "eps", "activation", "gated", "format", "group_size", "inputs")
    return linear[:8], dict(zip(names, linear[8:], strict=True))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_tokens_take_the_codes_of_the_reference(norm: str, dtype: torch.dtype) -> None:
    """But for those that lie between two codes, which another order of sums may turn: they are a code away."""
    linear = call(40, norm, dtype=dtype)._replace(x=torch.randn(40, COLUMNS).mul(3).to(dtype).to(DEVICE))
    linear.x[7] = 0.0
    linear.x[8, 1:] *= 1e-6  # codes below the smallest normal one
    values = normalize(linear.x, linear.norm_weight, linear.norm_bias, norm, linear.eps).to(dtype)
    expected = round_tokens(values, "fp8").float()
    found = rounded(linear)
    assert found.x.dtype is dtype
    assert (found.norm, found.norm_weight, found.norm_bias, found.inputs) == ("", None, None, "")
    away = (found.x.float() - expected).abs()
    assert float((away > 1e-6 * expected.abs()).float().mean()) <= (0.002 if dtype is torch.float32 else 0.02)
    assert bool((away <= 0.13 * expected.abs() + 1e-3 * values.float().abs().amax(1, keepdim=True)).all())


@pytest.mark.parametrize("tokens", [1, 3, MANY])
@pytest.mark.parametrize(("norm", "gated"), [("", False), ("rms", True), ("layer", False)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_every_number_of_tokens(tokens: int, norm: str, gated: bool, dtype: torch.dtype) -> None:
    """Through the choice of kernel; a product without the rounding would be off by ten times as much."""
    args, keywords = arguments(call(tokens, norm, gated=gated, dtype=dtype))
    expected = FUSED_LINEAR.spec.reference(*args, **keywords).float()
    unrounded = FUSED_LINEAR.spec.reference(*args, **keywords | {"inputs": ""}).float()
    found = launch.fused_linear(*args, **keywords)
    assert found.dtype is dtype
    assert found.shape == expected.shape
    distance, without = (float((item - expected).norm() / expected.norm()) for item in (found.float(), unrounded))
    assert distance <= (2e-3 if dtype is torch.float32 else 8e-3)
    assert without > 2 * distance


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("tokens", [3, MANY])
def test_numbers_that_are_not_finite_stay_so(value: float, tokens: int) -> None:
    linear = call(tokens, "rms", dtype=torch.float32)
    linear.x[1, 5] = value
    args, keywords = arguments(linear)
    finite = torch.isfinite(launch.fused_linear(*args, **keywords)).all(1)
    assert finite.tolist() == [row != 1 for row in range(tokens)]


def test_no_tokens() -> None:
    args, keywords = arguments(call(3, dtype=torch.float32))
    assert launch.fused_linear(args[0][:0], *args[1:7], None, **keywords).shape == (0, 48)


@pytest.mark.parametrize("tokens", [pytest.param(tokens, marks=ON_GPU) for tokens in (70, 300)])
def test_products_of_codes(tokens: int) -> None:
    """On the tensor cores of 8 bits, where results and columns are multiples of 16."""
    linear = call(tokens, "rms", dtype=torch.bfloat16)._replace(residual=None)
    assert multiplies_codes(linear)
    args, keywords = arguments(linear)
    expected = FUSED_LINEAR.spec.reference(*args, **keywords).float()
    distance = (product_of_codes(linear).float() - expected).norm() / expected.norm()
    assert float(distance) <= 8e-3
    assert not multiplies_codes(call(tokens, rows=40, dtype=torch.bfloat16))
    assert not multiplies_codes(call(tokens, dtype=torch.float16))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"inputs": "int8"}, "tokens rounded to 'int8' for a weight of the format 'fp8'; the kernel takes fp8 for fp8"),
        ({"format": ""}, "tokens rounded to 'fp8' for a weight of the format ''; the kernel takes fp8 for fp8"),
    ],
)
def test_says_what_it_takes(changes: dict[str, str], reason: str | None) -> None:
    args, keywords = arguments(call(3, dtype=torch.float32))
    assert accepts(args, keywords | changes) == reason
