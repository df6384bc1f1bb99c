"""fuse-rotary: one optc.rotary per query and key, the same numbers, and reasons where it cannot."""

from __future__ import annotations

import math
from typing import Any

import bounds
import pytest
import torch
import transformers as hf
from families import _GQA, FAMILIES, make_model
from rewrites import count, difference, rewritten, stir, stirred
from stages import sequences
from torch import Tensor

from optc.compiler.capture import capture_model, capture_module
from optc.compiler.execution.stage_driver import run_stage
from optc.compiler.ir.program import Program
from optc.passes.fusion.rotary import FuseRotary

ROTARY = torch.ops.optc.rotary.default
TRIG = (torch.ops.aten.cos.default, torch.ops.aten.sin.default)
WITHOUT = {"gpt2", "opt", "bert"}


@pytest.mark.parametrize("name", FAMILIES)
def test_one_rotary_per_query_and_key(name: str) -> None:
    program = stirred(name)
    result = rewritten(FuseRotary(), program)
    expected = 0 if name in WITHOUT else 2 * len(program.contract.layers)
    assert (result.matched, result.candidates, result.misses) == (expected, expected, ())
    assert count(result.program, ROTARY) == expected
    if expected:
        assert sum(count(result.program, op) for op in TRIG) == 0
        assert {node.args[1].name for node in result.program.calls(ROTARY)} == {"position_ids"}
        assert difference(program, result.program) <= 1e-5


@pytest.mark.parametrize("name", ["llama", "olmo2", "phi", "gemma3"])
def test_bf16_rounds_where_the_model_does(name: str) -> None:
    program = stirred(name, torch.bfloat16)
    result = rewritten(FuseRotary(), program)
    assert result.matched == 4
    rows = sequences(19, 7)
    expected, rounding = bounds.of_half(program, rows)
    bounds.check(run_stage(result.program, rows).logits, expected, rounding)
    computed = {node.meta["val"].dtype for node in result.program.calls(ROTARY)}
    # OLMo2 rotates in float32 and rounds after; the others round cos and sin first.
    assert computed == {torch.float32 if name == "olmo2" else torch.bfloat16}


def test_frequencies_become_float32_once() -> None:
    result = rewritten(FuseRotary(), stirred("llama", torch.bfloat16))
    names = {result.program.weight_of(node.args[2]) for node in result.program.calls(ROTARY)}
    assert names == {"model.rotary_emb.inv_freq_float32"}
    assert result.program.weight("model.rotary_emb.inv_freq_float32").dtype is torch.float32
    assert result.program.contract.sources["model.rotary_emb.inv_freq_float32"] == ("model.rotary_emb.inv_freq",)


@pytest.mark.parametrize(("name", "rotated"), [("phi", 8), ("gpt-neox", 4), ("llama", 16)])
def test_the_whole_head_goes_in_even_when_a_part_is_rotated(name: str, rotated: int) -> None:
    result = rewritten(FuseRotary(), stirred(name))
    for node in result.program.calls(ROTARY):
        assert node.args[0].meta["val"].shape[-1] == node.meta["val"].shape[-1] == 16
        assert 2 * node.args[2].meta["val"].shape[0] == rotated
        assert all(user.target is torch.ops.optc.attention.default for user in node.users)


def _variant(model: str, config: str, **more: Any) -> Program:
    settings = getattr(hf, config)(**{**_GQA, **more})
    settings._attn_implementation = "eager"
    torch.manual_seed(0)
    return capture_model(stir(getattr(hf, model)(settings).eval().requires_grad_(False)))


def _rope(kind: str, **more: float) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 10000.0, "original_max_position_embeddings": 64, **more}


def test_two_bases_in_one_model() -> None:
    kinds = ["sliding_attention", "full_attention"]
    program = _variant("Gemma3ForCausalLM", "Gemma3TextConfig", head_dim=16, sliding_window=8, layer_types=kinds)
    result = rewritten(FuseRotary(), program)
    names = [program.weight_of(node.args[2]) for node in result.program.calls(ROTARY)]
    assert names == [f"model.rotary_emb.{kind}_inv_freq" for kind in kinds for _ in range(2)]
    assert difference(program, result.program) <= 1e-5


def test_attention_factor() -> None:
    program = _variant("LlamaForCausalLM", "LlamaConfig", rope_parameters=_rope("yarn", factor=4.0))
    result = rewritten(FuseRotary(), program)
    factors = {node.kwargs["scaling"] for node in result.program.calls(ROTARY)}
    assert list(factors) == [pytest.approx(0.1 * math.log(4.0) + 1.0, abs=1e-12)]  # YaRN, eq. 22
    assert difference(program, result.program) <= 1e-5


@pytest.mark.parametrize(
    ("model", "config", "more", "rotated"),
    [("CohereForCausalLM", "CohereConfig", {}, 16), ("GlmForCausalLM", "GlmConfig", {"head_dim": 16}, 8)],
)
def test_neighbouring_pairs(model: str, config: str, more: dict[str, Any], rotated: int) -> None:
    program = _variant(model, config, **more)
    result = rewritten(FuseRotary(), program)
    assert result.matched == 4
    for node in result.program.calls(ROTARY):
        assert node.kwargs["interleaved"] is True
        assert 2 * node.args[2].meta["val"].shape[0] == rotated
    assert difference(program, result.program) <= 1e-5


def test_it_agrees_with_the_model() -> None:
    model = make_model("phi")
    result = rewritten(FuseRotary(), capture_model(model))
    ids, position = torch.arange(3, 40)[None], torch.arange(37)[None]
    torch.testing.assert_close(result.program(ids, position), model(ids).logits, rtol=0.0, atol=1e-4)


class _Rope(torch.nn.Module):
    """A rotation by hand, right or nearly right, of x [B, H, S, 8]."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.inv_freq = torch.nn.Buffer(torch.rand(4))
        self.phase = torch.nn.Buffer(torch.rand(4))
        self.table = torch.nn.Buffer(torch.rand(64, 8))

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        if self.kind == "table":
            cos = sin = self.table[position]
        else:
            angle = position[..., None].float() * self.inv_freq
            if self.kind == "matmul":
                angle = (self.inv_freq[None, :, None] @ position[:, None, :].float()).transpose(1, 2)
            if self.kind == "phase":
                angle = angle * self.phase
            angle = torch.cat([angle, angle], -1)
            cos, sin = angle.cos(), angle.sin() * (2.0 if self.kind == "factor" else 1.0)
        if self.kind != "flat":
            cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
        low, high = x[..., :4], x[..., 4:]
        turned = torch.cat([high, -low] if self.kind == "backwards" else [-high, low], -1)
        return x * cos + turned * sin


def _by_hand(kind: str) -> Program:
    x, axes = torch.rand(2, 3, 5, 8), {0: "batch", 2: "seq"}
    if kind == "flat":
        x, axes = x[:, 0].contiguous(), {0: "batch", 1: "seq"}
    position = torch.arange(5).expand(2, 5).contiguous()
    dynamic = {"x": axes, "position": {0: "batch", 1: "seq"}}
    return capture_module(_Rope(kind), (x, position), input_names=("x", "position"), dynamic=dynamic)


@pytest.mark.parametrize("kind", ["outer", "matmul"])
def test_angles_as_product_and_as_matmul(kind: str) -> None:
    program = _by_hand(kind)
    result = rewritten(FuseRotary(), program)
    assert (result.matched, count(result.program, ROTARY)) == (1, 1)
    x, position = torch.rand(4, 3, 7, 8), torch.randint(0, 50, (4, 7))
    torch.testing.assert_close(result.program(x, position), program(x, position), rtol=0.0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("table", "its factors are not cos and sin but come from index (aten.index.Tensor)"),
        ("phase", "its angles are not position [B, S] * inv_freq but come from position, inv_freq, phase"),
        ("factor", "it does not rotate the feature pairs of [B, H, S, D] by position * inv_freq"),
        ("backwards", "it does not rotate the feature pairs of [B, H, S, D] by position * inv_freq"),
        ("flat", "x has 3 axes, not [B, H, S, D]"),
    ],
)
def test_near_misses_say_why(kind: str, reason: str) -> None:
    program = _by_hand(kind)
    result = rewritten(FuseRotary(), program)
    assert result.program is program
    assert [miss.reason for miss in result.misses] == [reason]
    assert (result.matched, result.candidates) == (0, 1)
