"""The arithmetic of NVFP4, by hand."""

from __future__ import annotations

import pytest
import torch

from optc.compiler.ops.dialect.nvfp4 import BLOCK, scale_of

_optc = torch.ops.optc
VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def test_every_value_has_its_code() -> None:
    """A block whose largest is 6 under a scale of 1 has the block scale 1: codes are those of E2M1, bit 3 the sign."""
    x = torch.tensor([VALUES + [-value for value in VALUES]])
    codes, block_scale = _optc.quantize_nvfp4(x, torch.ones(1))
    assert codes.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 0, 9, 10, 11, 12, 13, 14, 15]]
    assert (codes.dtype, block_scale.dtype, block_scale.tolist()) == (
        torch.uint8,
        torch.float8_e4m3fn,
        [[1.0]],
    )
    back = _optc.dequantize_nvfp4(codes, block_scale, torch.ones(1), dtype=torch.bfloat16)
    assert back.dtype is torch.bfloat16
    assert back.tolist() == x.tolist()


def test_middles_go_to_the_even_code() -> None:
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -0.25, -0.75, -5.0, 0.24, 0.26, 5.01, -3.51, 0.0])
    codes, block_scale = _optc.quantize_nvfp4(x, torch.ones(1))
    back = _optc.dequantize_nvfp4(codes, block_scale, torch.ones(1), dtype=torch.float32)
    assert back.tolist() == [
        0.0,
        1.0,
        1.0,
        2.0,
        2.0,
        4.0,
        4.0,
        6.0,
        0.0,
        -1.0,
        -4.0,
        0.0,
        0.5,
        6.0,
        -4.0,
        0.0,
    ]
    assert codes[8] == 8  # minus zero, as ModelOpt writes it


def test_two_levels_of_scales_by_hand() -> None:
    """Largest 2688 = 6 * 448: scale 1, block scales 448 and 1/6 -> 0.171875 in E4M3, of zeros 1."""
    x = torch.zeros(3, BLOCK)
    x[0, 3], x[1, 0], x[1, 1] = -2688.0, 1.0, 0.2
    scale = scale_of(x.abs().max().reshape(1))
    assert scale.tolist() == [1.0]
    codes, block_scale = _optc.quantize_nvfp4(x, scale)
    assert block_scale.float().flatten().tolist() == [448.0, 0.171875, 1.0]
    back = _optc.dequantize_nvfp4(codes, block_scale, scale, dtype=torch.float32)
    assert back[0, 3] == -2688.0
    assert back[1, :2].tolist() == [6 * 0.171875, 1.0 * 0.171875]
    assert not back[2].any()
    assert scale_of(torch.zeros(1)).tolist() == [1.0]


def test_values_beyond_the_scale_are_clipped_and_tiny_ones_vanish() -> None:
    x = torch.cat([torch.full((BLOCK,), 5000.0), torch.full((BLOCK,), 1e-4)])
    codes, block_scale = _optc.quantize_nvfp4(x, torch.ones(1))
    assert block_scale.float().tolist() == [448.0, 2.0**-9]
    assert set(_optc.dequantize_nvfp4(codes, block_scale, torch.ones(1), dtype=torch.float32).tolist()) == {
        2688.0,
        0.0,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fake_implementations_agree(dtype: torch.dtype) -> None:
    x, scale = torch.randn(2, 3, 32).to(dtype), torch.ones(1)
    torch.library.opcheck(_optc.quantize_nvfp4.default, (x, scale), test_utils="test_faketensor")
    codes, block_scale = _optc.quantize_nvfp4(x, scale)
    arguments = (codes, block_scale, scale)
    torch.library.opcheck(_optc.dequantize_nvfp4.default, arguments, {"dtype": dtype}, test_utils="test_faketensor")
