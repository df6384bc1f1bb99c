"""`fused_linear`, `fused_norm`: packed layouts by hand and back, every option against the operators that it stands for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from optc.compiler.ops.packed.cuda import PackedWeight, dequantize_packed, pack_float, pack_integer, unpack_nibbles

_optc = torch.ops.optc
N, K = 16, 64


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def codes_below(top: int, *shape: int) -> Tensor:
    return torch.randint(0, top, shape, generator=torch.Generator().manual_seed(top), dtype=torch.uint8)


def test_nibbles_by_hand() -> None:
    """Byte j: column j in the low nibble, column j + 16 in the high one, code - 8 in two's complement."""
    codes = torch.full((1, 64), 8, dtype=torch.uint8)
    codes[0, 0], codes[0, 16], codes[0, 33], codes[0, 63] = 0, 15, 7, 9
    packed = pack_integer(codes, torch.ones(1, 1), None, 4).weight
    assert packed.shape == (1, 32)
    assert {place: value for place, value in enumerate(packed[0].tolist()) if value} == {0: 0x78, 17: 0x0F, 31: 0x10}
    assert unpack_nibbles(packed)[0].tolist() == (codes[0].int() - 8).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group_size", [0, 32])
@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (4, False), (8, True), (8, False)])
def test_integers_come_back(bits: int, symmetric: bool, group_size: int, dtype: torch.dtype) -> None:
    """Bit for bit what `dequantize` makes of the canonical codes."""
    groups = K // (group_size or K)
    codes, scale = codes_below(2**bits, N, K), random(N, groups).abs().to(dtype)
    zero = None if symmetric else codes_below(2**bits, N, groups)
    packed = pack_integer(codes, scale, zero, bits)
    found = dequantize_packed(*packed, format=f"int{bits}", group_size=group_size, dtype=dtype)
    assert torch.equal(found, _optc.dequantize(codes, scale, zero, bits=bits, group_size=group_size))


@pytest.mark.parametrize("scale", [random(1, 1), random(N, 1), random(N, 2)])
def test_floats_come_back(scale: Tensor) -> None:
    codes = random(N, K).to(torch.float8_e4m3fn)
    group_size = K // scale.shape[1] if scale.shape[1] > 1 else 0
    packed = pack_float(codes, scale)
    assert packed.scale.shape == (N, scale.shape[1])
    found = dequantize_packed(*packed, format="fp8", group_size=group_size, dtype=torch.float32)
    assert torch.equal(found, _optc.dequantize_float(codes, scale, group_size=group_size))


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rms": {"norm": "rms", "eps": 1e-5},
    "layer": {"norm": "layer", "eps": 1e-5},
    "silu gated": {"activation": "silu", "gated": True},
    "gelu": {"activation": "gelu"},
    "gelu_tanh gated": {"activation": "gelu_tanh", "gated": True},
    "relu": {"activation": "relu"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_against_aten(name: str) -> None:
    knobs = OPTIONS[name]
    norm, gated, kind = knobs.get("norm", ""), knobs.get("gated", False), knobs.get("activation", "")
    x, weight, bias = random(2, 3, K), random(N, K), random(N)
    residual = random(2, 3, N // 2 if gated else N)
    norm_weight, norm_bias = (random(K) if norm else None), (random(K, seed=1) if norm == "layer" else None)
    found = _optc.fused_linear(x, weight, None, None, norm_weight, norm_bias, bias, residual, **knobs)
    values = x
    if norm == "rms":
        values = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-5) * norm_weight
    elif norm == "layer":
        values = F.layer_norm(x, (K,), norm_weight, norm_bias, 1e-5)
    y = values @ weight.t() + bias
    activation = {
        "": lambda v: v,
        "silu": lambda v: v * torch.sigmoid(v),
        "gelu": lambda v: 0.5 * v * (1 + torch.erf(v * 0.5**0.5)),
        "gelu_tanh": lambda v: 0.5 * v * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (v + 0.044715 * v**3))),
        "relu": lambda v: v.clamp(min=0),
    }[kind]
    y = activation(y[..., : N // 2]) * y[..., N // 2 :] if gated else activation(y)
    torch.testing.assert_close(found, y + residual, rtol=1e-5, atol=1e-5)


def test_packed_weight_in_16_bits_is_rounded_once() -> None:
    """At the end: not the weight, not the norm's output."""
    codes, scale = codes_below(16, N, K), random(N, 2).abs().bfloat16()
    x, norm_weight = random(3, K).bfloat16(), random(K).bfloat16()
    packed: PackedWeight = pack_integer(codes, scale, None, 4)
    knobs = {"norm": "rms", "eps": 1e-6, "format": "int4", "group_size": 32}
    found = _optc.fused_linear(x, *packed, norm_weight, None, None, None, **knobs)
    weight = (codes.double() - 8) * scale.double().repeat_interleave(32, 1)
    exact = F.rms_norm(x.double(), (K,), norm_weight.double(), 1e-6) @ weight.t()
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-4)
    assert not torch.equal(exact.float(), exact.float().bfloat16().float()), "the check can fail"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", ["", "rms", "layer"])
def test_fused_norm_is_what_it_stands_for(norm: str, dtype: torch.dtype) -> None:
    """In float64; ragged rows, one rounding."""
    x, residual = random(2, 3, K).to(dtype) + 1, random(2, 3, K, seed=1).to(dtype)
    weight, bias = random(K, seed=2), random(K, seed=3).to(dtype)
    given = (None if norm == "" else weight, bias if norm == "layer" else None)
    found = _optc.fused_norm(x, *given, residual, norm=norm, eps=1e-5, factor=0.22)
    y = x.double()
    if norm == "rms":
        y = y * torch.rsqrt((y * y).mean(-1, keepdim=True) + 1e-5) * weight.double()
    elif norm == "layer":
        y = F.layer_norm(y, (K,), weight.double(), bias.double(), 1e-5)
    assert found.dtype is dtype
    torch.testing.assert_close(found.double(), 0.22 * y + residual.double(), rtol=torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_experts_sums_what_was_chosen(dtype: torch.dtype) -> None:
    """Token by token in float64."""
    up, down = random(4, 2 * N, K).to(dtype), random(4, 6, N, seed=1).to(dtype)
    x, residual, weights = random(3, K).to(dtype), random(3, 6).to(dtype), random(3, 2, seed=2)
    indices = torch.tensor([[0, 3], [2, 1], [1, 1]])
    found = _optc.fused_experts(x, up, down, indices, weights, residual, activation="silu", gated=True)
    expected = residual.double()
    for token, row in enumerate(indices.tolist()):
        for slot, expert in enumerate(row):
            gate, half = (up[expert].double() @ x[token].double()).chunk(2)
            expected[token] += weights[token, slot].double() * (down[expert].double() @ (F.silu(gate) * half))
    assert found.dtype is dtype
    scale = float(expected.abs().max())
    torch.testing.assert_close(found.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5 * scale)


@pytest.mark.parametrize("normalized", [False, True])
def test_choose_experts(normalized: bool) -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [5.0, -1.0, 4.0]]).bfloat16()
    weights, indices = _optc.choose_experts(logits, slots=2, normalized=normalized)
    assert indices.tolist() == [[1, 2], [0, 2]]
    powers = logits.double().exp()
    chosen = powers.gather(1, indices)
    expected = chosen / (chosen if normalized else powers).sum(-1, keepdim=True)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-6, atol=0)
