"""The operators of quantization: numbers worked out by hand, and fakes that agree with the references."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import optc.compiler.ops  # noqa: F401  (registers the dialect)

_optc = torch.ops.optc
FP8 = torch.float8_e4m3fn


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_float_codes_by_hand() -> None:
    codes = torch.tensor([[1.0, -2.5, 448.0], [0.0, 0.015625, -448.0]]).to(FP8)
    rows = _optc.dequantize_float(codes, torch.tensor([[2.0], [0.5]]))
    assert rows.tolist() == [[2.0, -5.0, 896.0], [0.0, 0.0078125, -224.0]]
    whole = _optc.dequantize_float(codes, torch.tensor([[0.25]], dtype=torch.bfloat16))
    assert whole.dtype is torch.bfloat16
    assert whole.tolist() == [[0.25, -0.625, 112.0], [0.0, 0.00390625, -112.0]]


def test_float_codes_in_groups() -> None:
    codes = torch.tensor([[1.0, 2.0, 3.0, 4.0]]).to(FP8)
    found = _optc.dequantize_float(codes, torch.tensor([[10.0, 0.5]]), group_size=2)
    assert found.tolist() == [[10.0, 20.0, 1.5, 2.0]]


def test_codebook_by_hand() -> None:
    codes = torch.tensor([[0, 3, 1, 2]], dtype=torch.uint8)
    table = torch.tensor([-1.0, -0.25, 0.0, 1.0])
    found = _optc.dequantize_codebook(codes, torch.tensor([[2.0, 8.0]]), table, bits=2, group_size=2)
    assert found.tolist() == [[-2.0, 2.0, -2.0, 0.0]]


def test_int8_codes_of_tokens_by_hand() -> None:
    """Each token has a scale of its own; a row of zeros gives zeros; halves go to the even code."""
    x = torch.tensor([[[127.0, -63.5, 0.5], [0.0, 0.0, 0.0]], [[-2.54, 1.27, 0.01], [1e-30, 0.0, -1e-30]]])
    codes, scale = _optc.quantize_dynamic(x, format="int8")
    assert codes.dtype is torch.int8
    assert codes.tolist() == [[[127, -64, 0], [0, 0, 0]], [[-127, 64, 0], [127, 0, -127]]]
    assert scale.dtype is torch.float32
    assert scale.shape == (2, 2, 1)
    torch.testing.assert_close(scale[..., 0], torch.tensor([[1.0, 0.0], [0.02, 1e-30 / 127]]))
    back = _optc.dequantize_activation(codes, scale, dtype=torch.float32)
    assert back[0, 0].tolist() == [127.0, -64.0, 0.0]
    assert back[0, 1].tolist() == [0.0, 0.0, 0.0]


def test_fp8_codes_of_tokens_by_hand() -> None:
    """max|x| lands on 448; 3 bits of mantissa: 17 * 448 / 448 lies half-way between 16 and 18 and goes to 16."""
    x = torch.tensor([[448.0, 17.0, -19.0], [4.48, -0.18, 0.0]])
    codes, scale = _optc.quantize_dynamic(x, format="fp8")
    assert codes.dtype is FP8
    assert codes.float().tolist() == [[448.0, 16.0, -20.0], [448.0, -18.0, 0.0]]
    torch.testing.assert_close(scale[:, 0], torch.tensor([1.0, 0.01]))


def test_static_scales_clip() -> None:
    x = torch.tensor([[-5.0, 0.24, 0.26, 70.0, -70.0]])
    codes = _optc.quantize(x, torch.tensor([0.5]), format="int8")
    assert codes.tolist() == [[-10, 0, 1, 127, -128]]
    floats = _optc.quantize(torch.tensor([1000.0, -1000.0, 3.0]), torch.tensor([1.0]), format="fp8")
    assert floats.float().tolist() == [448.0, -448.0, 3.0]  # out of range is the last code, not NaN


def test_static_scales_per_head() -> None:
    x = torch.ones(2, 3, 4, 5)
    scale = torch.tensor([1.0, 0.5, 0.25]).reshape(3, 1, 1)
    codes = _optc.quantize(x, scale, format="int8")
    assert codes[1, :, 2, 3].tolist() == [1, 2, 4]
    assert torch.equal(_optc.dequantize_activation(codes, scale, dtype=torch.float16), x.half())


@pytest.mark.parametrize("format", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 7, 33), (5, 16)])
def test_a_round_trip_stays_within_half_a_step(shape: tuple[int, ...], dtype: torch.dtype, format: str) -> None:
    x = random(*shape).to(dtype)
    codes, scale = _optc.quantize_dynamic(x, format=format)
    back = _optc.dequantize_activation(codes, scale, dtype=torch.float32)
    step = scale / 2 if format == "int8" else (x.float().abs() / 16).clamp(min=1e-3) * 1.001
    assert bool(((back - x.float()).abs() <= step * 1.001).all())
    assert bool((back.abs().amax(-1) - x.float().abs().amax(-1)).abs().max() <= 1e-5)


def test_nan_is_not_hidden() -> None:
    x = torch.tensor([[1.0, float("nan")], [1.0, 2.0]])
    codes, scale = _optc.quantize_dynamic(x, format="int8")
    back = _optc.dequantize_activation(codes, scale, dtype=torch.float32)
    assert bool(back[0].isnan().all())
    assert bool(back[1].isfinite().all())


CALLS = {
    "dequantize_float": lambda: ((random(6, 8).to(FP8), random(6, 1)), {}),
    "dequantize_codebook": lambda: (
        (torch.randint(0, 16, (6, 8)).to(torch.uint8), random(6, 2), random(16)),
        {"bits": 4, "group_size": 4},
    ),
    "quantize_dynamic": lambda: ((random(2, 3, 8).transpose(0, 1),), {"format": "fp8"}),
    "quantize": lambda: ((random(2, 3, 8).transpose(0, 1), torch.ones(1)), {"format": "int8"}),
    "dequantize_activation": lambda: (
        (torch.randint(-9, 9, (2, 8)).to(torch.int8), random(2, 1)),
        {"dtype": torch.bfloat16},
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_fakes_agree_with_references(name: str) -> None:
    """Shapes, types and strides, with symbolic sizes too."""
    args, kwargs = CALLS[name]()
    tests = ("test_faketensor",)  # its schema test multiplies, which no float8 tensor can
    torch.library.opcheck(getattr(_optc, name).default, args, kwargs, test_utils=tests)
