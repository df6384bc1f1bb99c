"""Biases of keys (ALiBi, and what a key says itself) become features of queries and keys, which every cache keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from stages import apply, full_logits, largest, sequences

from optc.compiler.capture import capture_model
from optc.compiler.execution.stage_driver import run_stage
from optc.compiler.ir.program import Program
from optc.compiler.rewriting.tokenwise import cache_misses
from optc.passes.fusion.attention import FuseAttention
from optc.passes.kv_cache.quantize import QuantizeKVCache
from optc.passes.kv_cache.static import StaticKVCache

_ATTENTION = torch.ops.optc.attention.default
_IDS: dict[str, Any] = {"vocab_size": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _bloom(heads: int = 3) -> Any:
    """Heads that are no power of two have slopes of two series; batch and heads are one axis there."""
    return hf.BloomForCausalLM(hf.BloomConfig(**_IDS, hidden_size=12 * heads, n_layer=1, n_head=heads))


def _mpt() -> Any:
    """Its bias is counted back from the last key: slope * (k - T + 1)."""
    return hf.MptForCausalLM(hf.MptConfig(**_IDS, d_model=32, n_heads=2, n_layers=1, max_seq_len=64))


def _doge() -> Any:
    """Each key is weighed by its value, in one tensor with the mask, for two query heads each."""
    return hf.DogeForCausalLM(
        hf.DogeConfig(
            **_IDS, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
            intermediate_size=32, max_position_embeddings=64,
        )
    )  # fmt: skip


def _captured(model: Any) -> Program:
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.copy_(torch.randn_like(weight) * weight.shape[-1] ** -0.5 * 2)
    return capture_model(model.eval().requires_grad_(False))


@pytest.mark.parametrize("make", [_bloom, _mpt, _doge])
def test_the_bias_is_one_feature_more_and_a_cache_keeps_it(make: Any) -> None:
    before = _captured(make())
    result = apply(FuseAttention(), before)
    assert (result.matched, result.misses) == (1, ())
    (layer,) = result.program.contract.layers
    assert (layer.head_dim, layer.value_dim) == ((16, 16) if make is _bloom else (24, 24))  # of 12 and 16
    assert len(result.program.calls(_ATTENTION)) == 1
    assert cache_misses(result.program, sinks=True) == ()
    rows = sequences(29, 1, 17)
    expected = [full_logits(before, row) for row in rows]
    assert largest([full_logits(result.program, row) for row in rows], expected) < 2e-5
    cached = apply(StaticKVCache(), result.program).program
    assert largest(run_stage(cached, rows).logits, expected) < 2e-5


def test_positions_in_16_bits_are_held_without_rounding() -> None:
    """bfloat16 has no number between 256 and 258; a step of the largest slope is 0.5 there."""
    narrow = apply(FuseAttention(), _captured(_bloom(2).to(torch.bfloat16))).program
    (made,) = (call.args[1].args[0][1] for call in narrow.calls(_ATTENTION))
    ids, positions = torch.zeros(1, 40, dtype=torch.long), torch.arange(300, 340)[None]
    seen = _value(narrow, made, ids, positions)
    assert seen.shape[-1] == 4  # 12 features of a head, and 2 of positions, to a multiple of 8
    assert torch.equal(seen.double().sum(-1)[0, 0], positions[0].double())


def _value(program: Program, node: Any, *inputs: torch.Tensor) -> torch.Tensor:
    """What a node computes in a call."""
    seen = []

    class _Watch(torch.fx.Interpreter):
        def run_node(self, n: Any) -> Any:
            value = super().run_node(n)
            if n.name == node.name:
                seen.append(value)
            return value

    _Watch(program.module()).run(*inputs)
    return seen[0]


def test_codes_of_8_bits_hold_no_positions() -> None:
    result = QuantizeKVCache().run(apply(FuseAttention(), _captured(_mpt())).program, None)  # type: ignore[arg-type]
    (miss,) = result.misses
    assert miss.reason == "its keys hold positions (a bias that grows along the keys), which codes of 8 bits do not"
