"""Fake quantization: the numbers of the passes bit for bit, gradients by hand, and which modules are replaced."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from families import make_model
from torch import nn

from optc.compiler.diagnostics import InputError, NoMatchError, UsageError
from optc.compiler.formats.layouts.key_values import KeyValueScheme
from optc.passes.quantization.arithmetic.grid import Grid, full_range, search
from optc.training.fake_quantize import (
    fake_quantize_static,
    fake_quantize_tokens,
    fake_quantize_weight,
    storable_scale,
)
from optc.training.kv_rounding import KVRounding, kv_roundings
from optc.training.lora import LoraConfig, apply_lora
from optc.training.qat import FakeQuantizedLinear, QatConfig, apply_qat, quantized_linears

IDS = torch.randint(3, 128, (2, 12), generator=torch.Generator().manual_seed(0))
_optc = torch.ops.optc


def trainable(name: str = "llama", attention: str = "sdpa") -> Any:
    return make_model(name, attention=attention).requires_grad_(True).train()


def step(model: Any, rate: float = 1e-2) -> float:
    """One step of Adam on fixed tokens; the loss before it."""
    loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
    loss.backward()
    torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate).step()
    model.zero_grad()
    return float(loss.detach())


@pytest.mark.parametrize("scales", ["learned", "minmax"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, 32), (3, 128), (4, 32), (4, 64), (4, 0), (8, 0)])
def test_a_trained_weight_is_the_dequantize_of_its_codes(
    bits: int, group_size: int, symmetric: bool, scales: Any
) -> None:
    torch.manual_seed(0)
    config = QatConfig(enabled=True, bits=bits, group_size=group_size, symmetric=symmetric, scales=scales)
    linear = FakeQuantizedLinear(nn.Linear(256, 24), config)
    optimizer = torch.optim.Adam(linear.parameters(), lr=1e-2)
    start = linear.grid().scale.detach()
    for _ in range(3):
        linear(torch.randn(5, 256)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    kept = linear.quantized()
    assert kept.codes.dtype == torch.uint8
    assert int(kept.codes.max()) < 2**bits
    assert (kept.zero is None) == symmetric
    exported = _optc.dequantize(kept.codes, kept.scale, kept.zero, bits=bits, group_size=group_size)
    assert torch.equal(fake_quantize_weight(linear.weight, linear.grid()), exported)
    x = torch.randn(3, 256)
    assert torch.equal(linear(x), nn.functional.linear(x, exported, linear.bias))
    assert torch.equal(kept.scale, kept.scale.half().float())
    assert not torch.equal(kept.scale, start)


def test_scales_begin_where_the_passes_begin() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(64, 8)
    for start, find in (("search", search), ("full", full_range)):
        config = QatConfig(enabled=True, bits=3, group_size=32, start=start)  # type: ignore[arg-type]
        assert torch.equal(FakeQuantizedLinear(plain, config).grid().scale, find(plain.weight, 3, 32, True).scale)
    least, most = (
        (fake_quantize_weight(plain.weight, find(plain.weight, 3, 32, True)) - plain.weight).square().sum()
        for find in (search, full_range)
    )
    assert least < most


def test_gradients_are_straight_through_and_lsq() -> None:
    """One group of four 2-bit weights, by hand: codes -2..1, step 0.5; the last weight is clipped."""
    weight = torch.tensor([[0.3, -0.6, 0.1, 2.0]], requires_grad=True)
    scale = torch.tensor([[0.5]], requires_grad=True)
    value = fake_quantize_weight(weight, Grid(scale, torch.tensor([[2.0]]), 2, 4, True))
    assert value.tolist() == [[0.5, -0.5, 0.0, 0.5]]
    (value * torch.tensor([[1.0, 2.0, 3.0, 4.0]])).sum().backward()
    assert weight.grad is not None
    assert scale.grad is not None
    assert weight.grad.tolist() == [[1.0, 2.0, 3.0, 0.0]]
    slopes = (1 - 0.6) * 1 + (-1 + 1.2) * 2 + (0 - 0.2) * 3 + 1 * 4
    assert float(scale.grad) == pytest.approx(slopes / math.sqrt(4 * 1))


def test_scales_are_rounded_to_float16_with_a_gradient() -> None:
    scale = torch.tensor([0.1, 1e-7], requires_grad=True)
    rounded = storable_scale(scale)
    assert rounded[0] == torch.tensor(0.1).half().float()
    assert rounded[1] == scale[1]  # below float16's normal numbers a scale keeps its 32 bits
    rounded.sum().backward()
    assert scale.grad is not None
    assert scale.grad.tolist() == [1.0, 1.0]


def test_inputs_are_rounded_as_the_operator_rounds_them() -> None:
    x = torch.randn(2, 3, 8, requires_grad=True)
    codes, scale = _optc.quantize_dynamic(x.detach(), format="int8")
    value = fake_quantize_tokens(x)
    assert torch.equal(value, _optc.dequantize_activation(codes, scale, dtype=torch.float32))
    value.sum().backward()
    assert x.grad is not None
    assert bool((x.grad == 1).all())
    fixed = torch.tensor([1.0 / 127])
    y = torch.tensor([0.5, 2.0, -2.0], requires_grad=True)
    assert fake_quantize_static(y, fixed).tolist() == pytest.approx([64 / 127, 1.0, -128 / 127])
    fake_quantize_static(y, fixed).sum().backward()
    assert y.grad is not None
    assert y.grad.tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3", "gemma3", "mixtral", "opt", "gpt-neox"])
def test_any_decoder_trains(family: str) -> None:
    model = trainable(family)
    every = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    apply_qat(model, QatConfig(enabled=True))
    replaced = {name for name, _ in quantized_linears(model)}
    left = every - replaced
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    assert left == ({head} if head in every else set())
    first = step(model)
    assert step(model) < first
    names = dict(model.named_parameters())
    assert all(f"{name}.scale_log" in names and names[f"{name}.scale_log"].dim() == 1 for name in replaced)
    assert any(bool(names[f"{name}.scale_log"].any()) for name in replaced)


def test_routers_of_listed_experts_stay() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(32, 4)
            self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))

    model = apply_qat(Experts(), QatConfig(enabled=True))
    assert [name for name, _ in quantized_linears(model)] == [f"experts.{i}" for i in range(4)]


def test_min_max_scales_follow_the_weights() -> None:
    model = apply_qat(trainable(), QatConfig(enabled=True, scales="minmax", symmetric=False))
    _, linear = next(quantized_linears(model))
    before = linear.grid().scale
    with torch.no_grad():
        linear.weight.mul_(2)
    assert torch.allclose(linear.grid().scale, 2 * before, rtol=1e-3)
    assert linear.scale_log is None


def test_ignored_linears_and_the_head() -> None:
    model = trainable()
    apply_qat(model, QatConfig(enabled=True, ignore=("*.down_proj.*", "model.layers.0.*"), head=True))
    names = [name for name, _ in quantized_linears(model)]
    assert "lm_head" in names
    assert all(name.startswith(("model.layers.1.", "lm_head")) and "down" not in name for name in names)
    assert len(names) == 7
    assert apply_qat(trainable(), QatConfig()).get_submodule("lm_head") is not None  # disabled: as it was


@pytest.mark.parametrize("ignore", ["q_proj", "up_proj", "model.layers.0.self_attn.v_proj.weight"])
def test_a_part_of_what_vllm_computes_as_one_is_refused(ignore: str) -> None:
    """The trained folder could not be loaded; the whole of it may stay as it is."""
    with pytest.raises(UsageError, match="as one linear") as caught:
        apply_qat(trainable(), QatConfig(enabled=True, ignore=(ignore,)))
    assert "or none of them" in str(caught.value.remedy)
    apply_qat(trainable(), QatConfig(enabled=True, ignore=("q_proj", "k_proj", "v_proj")))


@pytest.mark.parametrize("granularity", ["layer", "head"])
def test_keys_and_values_are_rounded_with_the_ranges_of_training(granularity: Any) -> None:
    model = trainable()
    plain = model.eval()(input_ids=IDS).logits.detach()
    apply_qat(
        model.train(),
        QatConfig(enabled=True, bits=8, group_size=0, kv_cache="int8", kv_granularity=granularity),
    )
    step(model, 1e-4)
    found = dict(kv_roundings(model))
    assert list(found) == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    rounding = found["model.layers.1.self_attn"]
    assert rounding.scales()[0].shape == ((1,) if granularity == "layer" else (2, 1, 1))
    seen = rounding.key_largest.clone()
    assert bool((seen > 0).all())
    with torch.no_grad():
        rounded = model.eval()(input_ids=IDS.flip(0)).logits.flip(0)
        model(input_ids=(IDS + 7) % 128)
    assert torch.equal(seen, rounding.key_largest)  # evaluation changes no range
    assert 0 < float((rounded - plain).abs().max()) < 0.5 * float(plain.abs().max())


def test_a_rounding_is_that_of_the_operators() -> None:
    rounding = KVRounding(KeyValueScheme("int8", "head"), 2).train()
    key, value = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4)
    found = rounding(key, value)
    for x, scale, made in zip((key, value), rounding.scales(), found, strict=True):
        assert torch.equal(scale.flatten(), x.abs().amax((0, 2, 3)) / 127)
        codes = _optc.quantize(x, scale, format="int8")
        assert torch.equal(made, _optc.dequantize_activation(codes, scale, dtype=torch.float32))


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(InputError, match=r"(?s)group size 48 does not divide every weight.*q_proj.weight"):
        apply_qat(trainable(), QatConfig(enabled=True, group_size=48))
    with pytest.raises(NoMatchError, match=r"'\*\.up\.\*' matches no weight"):
        apply_qat(trainable(), QatConfig(enabled=True, ignore=("*.up.*",)))
    with pytest.raises(UsageError, match="already prepared for quantization-aware training"):
        apply_qat(apply_qat(trainable(), QatConfig(enabled=True)), QatConfig(enabled=True))
    with pytest.raises(InputError, match="the model has no linear to quantize"):
        apply_qat(trainable(), QatConfig(enabled=True, ignore=("*",)))
    with pytest.raises(InputError, match=r"(?s)its attention 'eager' is not one that transformers looks up"):
        apply_qat(trainable(attention="eager"), QatConfig(enabled=True, kv_cache="int8"))
    with pytest.raises(UsageError, match="rounded activations need symmetric 8-bit weights"):
        QatConfig(activations="int8")
    with pytest.raises(UsageError, match=r"qat\.scale_rate is 0"):
        QatConfig(scale_rate=0)
    with pytest.raises(UsageError, match="5-bit weights are not supported"):
        QatConfig(bits=5)
    shared = nn.Module()
    shared.a, shared.b = nn.Linear(32, 32), nn.Linear(32, 32)
    shared.b.weight = shared.a.weight
    with pytest.raises(InputError, match=r"(?s)two linears share one weight.*a\.weight, b\.weight"):
        apply_qat(shared, QatConfig(enabled=True))
    pytest.importorskip("peft", reason="needs peft (extra train)")
    adapted = apply_lora(trainable(), LoraConfig(enabled=True, rank=2))
    with pytest.raises(UsageError, match="adapters and quantization-aware training cannot be combined"):
        apply_qat(adapted, QatConfig(enabled=True))
