"""Packed products of codes: by hand, and against the kernels of ONNX Runtime that they stand for."""

from __future__ import annotations

from pathlib import Path

import ort_driver
import pytest
import torch
from torch import Tensor

from optc.compiler.capture import capture_module
from optc.compiler.ops.packed.onnxruntime_products import pack_bnb4
from optc.passes.quantization.nf4 import normal_float

_optc = torch.ops.optc


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_token_codes_by_hand() -> None:
    codes, scale = _optc.quantize_tokens(torch.tensor([[127.0, -2.5, 1.5], [0.0, 0.0, 0.0]]))
    assert codes.tolist() == [[255, 126, 130], [128, 128, 128]]
    assert scale[0].item() == 1.0


@pytest.mark.parametrize("unsigned", [False, True])
def test_integer_product_by_hand(unsigned: bool) -> None:
    codes = torch.tensor([[255, 126]], dtype=torch.uint8)
    weight = torch.tensor([[3, -127], [50, 0]])
    weight = (weight + 128).to(torch.uint8) if unsigned else weight.to(torch.int8)
    out = _optc.matmul_integer(codes, weight, torch.tensor([[0.5]]), torch.tensor([2.0, 4.0]), torch.ones(2))
    assert out.tolist() == [[(3 * 127 - 2 * 50) * 1.0 + 1, -127 * 127 * 2.0 + 1]]


def test_nf4_pairs_have_the_first_code_in_the_high_bits() -> None:
    packed = pack_bnb4(torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8))
    assert packed.tolist() == [0x12, 0xF0]


class _Tokens(torch.nn.Module):
    """The two halves of W8A8: [K, N] = [256, 25]; weights and inputs reach the ends of their ranges."""

    def __init__(self, unsigned: bool, bias: bool) -> None:
        super().__init__()
        weight = torch.randint(-127, 128, (256, 25), generator=torch.Generator().manual_seed(0))
        weight[:, 3] = 127
        stored = (weight + 128).to(torch.uint8) if unsigned else weight.to(torch.int8)
        self.register_buffer("weight", stored)
        self.register_buffer("scale", random(25, seed=1).abs() * 0.01)
        self.register_buffer("bias", random(25, seed=2) if bias else None)

    def forward(self, x: Tensor) -> Tensor:
        codes, scale = _optc.quantize_tokens(x)
        return _optc.matmul_integer(codes, self.weight, scale, self.scale, self.bias)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("unsigned", [pytest.param(False, marks=ort_driver.EXACT_PRODUCTS), True])
def test_integer_products_are_the_kernels(unsigned: bool, bias: bool, tmp_path: Path) -> None:
    """One token and many, a token of zeros among them, and one whose every code is the largest."""
    module = _Tokens(unsigned, bias)
    program = capture_module(module, [random(2, 3, 256)], dynamic={"input_0": {0: "batch"}})
    ort_driver.exported(program, tmp_path)
    session = ort_driver.open_session(tmp_path)
    for batch in (1, 11):
        x = random(batch, 3, 256, seed=batch)
        x[0, 1], x[0, 2] = 0.0, 7.0
        torch.testing.assert_close(ort_driver.run(session, x)[0], module(x), rtol=1e-5, atol=1e-4)


class _Codebook(torch.nn.Module):
    """[N, K] = [25, 256]."""

    def __init__(self, block: int) -> None:
        super().__init__()
        codes = torch.randint(0, 16, (25, 256), generator=torch.Generator().manual_seed(0))
        self.register_buffer("packed", pack_bnb4(codes.to(torch.uint8)))
        self.register_buffer("absmax", random(25 * 256 // block, seed=1).abs())
        self.register_buffer("table", normal_float().clone())
        self.knobs = {"K": 256, "N": 25, "block_size": block}

    def forward(self, x: Tensor) -> Tensor:
        return _optc.matmul_bnb4(x, self.packed, self.absmax, self.table, **self.knobs)


@pytest.mark.parametrize("block", [16, 32, 64, 128, 256])
def test_matmul_bnb4_is_the_kernel(block: int, tmp_path: Path) -> None:
    """Its table is built in: that it is ours shows here."""
    module = _Codebook(block)
    program = capture_module(module, [random(2, 3, 256)], dynamic={"input_0": {0: "batch"}})
    ort_driver.exported(program, tmp_path)
    session = ort_driver.open_session(tmp_path)
    for x in (random(1, 3, 256), random(11, 3, 256)):
        torch.testing.assert_close(ort_driver.run(session, x)[0], module(x), rtol=1e-5, atol=1e-4)
