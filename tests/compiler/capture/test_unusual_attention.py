"""Models whose attention, experts or positions are not a Llama's: each capture is proved against transformers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from stages import apply

from optc.compiler.capture import capture_model, pretrained
from optc.compiler.capture.attention import NAME, register, run_experts
from optc.compiler.diagnostics import GateError
from optc.compiler.ir.text import format_program
from optc.compiler.rewriting.tokenwise import cache_misses
from optc.passes.fusion.attention import FuseAttention

_OPTC = torch.ops.optc.attention.default
_SIZE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 64, "n_positions": 32}
_T5: dict[str, Any] = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "vocab_size": 64}
_BART: dict[str, Any] = {
    "d_model": 32,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 64,
    "encoder_layers": 1,
    "vocab_size": 64,
    "max_position_embeddings": 32,
}


def _large(cls: Any, config: Any) -> Any:
    torch.manual_seed(0)
    model = cls(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3.0) if weight.ndim > 1 else weight.add_(torch.randn_like(weight) * 0.05)
    return model.eval().requires_grad_(False)


def _notes(program: Any) -> str:
    assert program.proof is not None
    assert program.proof.proved
    return "; ".join(program.proof.notes)


# -- attention from a table of the model's own -------------------------------------------------------


_OWN = [
    (hf.GPTJForCausalLM, hf.GPTJConfig(**_GPT, rotary_dim=8)),
    (hf.CodeGenForCausalLM, hf.CodeGenConfig(**{**_GPT, "n_head": 4}, n_ctx=32, rotary_dim=4)),
    (hf.FalconForCausalLM, hf.FalconConfig(**_SIZE)),
    (hf.OpenAIGPTLMHeadModel, hf.OpenAIGPTConfig(**_GPT)),  # multiplies scores by its mask, and adds -10000
    # Batch and heads are one axis: of the scores alone, and of weights and values too.
    (hf.GPTNeoXJapaneseForCausalLM, hf.GPTNeoXJapaneseConfig(**_SIZE)),
    (hf.MvpForCausalLM, hf.MvpConfig(**_BART, decoder_start_token_id=1)),
    # Rows of its table, which it cuts and stacks, turn queries and keys of all heads.
    (hf.RoFormerForCausalLM, hf.RoFormerConfig(**_SIZE, intermediate_size=32, is_decoder=True)),
    # Masked scores are raised to the lowest number.
    (hf.XGLMForCausalLM, hf.XGLMConfig(**_BART, num_layers=1, attention_heads=2, ffn_dim=64)),
    (
        hf.GPTNeoForCausalLM,
        hf.GPTNeoConfig(
            hidden_size=32, num_layers=2, num_heads=2, vocab_size=64, max_position_embeddings=32, window_size=4,
            attention_types=[[["global", "local"], 1]],
        ),
    ),
]  # fmt: skip


@pytest.mark.parametrize(("cls", "config"), _OWN, ids=lambda item: getattr(item, "__name__", ""))
def test_attention_of_a_models_own_is_found_in_the_graph(cls: Any, config: Any) -> None:
    program = capture_model(_large(cls, config))
    if cls is not hf.OpenAIGPTLMHeadModel:  # which has no part in transformers' attention interface
        assert "captured with eager attention: the model picks its attention from a table of its own" in _notes(program)
    fused = apply(FuseAttention(), program).program
    layers = fused.contract.layers
    assert len(layers) == len(fused.calls(_OPTC)) == (2 if cls is hf.GPTNeoForCausalLM else 1)
    assert [layer.window for layer in layers] == ([0, 4] if cls is hf.GPTNeoForCausalLM else [0])
    assert cache_misses(fused, sinks=True) == ()
    # Some cut a table of 32 rows, and torch makes a special case of the whole one.
    cut = cls in (hf.GPTNeoForCausalLM, hf.OpenAIGPTLMHeadModel)
    assert program.contract.model.context_length == (31 if cut else 32)


@pytest.mark.parametrize("causal", [False, True])
def test_a_config_says_whether_a_model_is_causal(causal: bool) -> None:
    """XLM has one class for both: masked, its tokens see those behind them, and it is captured with its mask."""
    sizes = {"emb_dim": 32, "n_layers": 1, "n_heads": 2, "vocab_size": 64, "max_position_embeddings": 32}
    config = hf.XLMConfig(**sizes, causal=causal, pad_index=0, pad_token_id=0, n_langs=1)
    program = capture_model(_large(hf.XLMWithLMHeadModel, config))
    fused = apply(FuseAttention(), program).program
    assert [layer.causal for layer in fused.contract.layers] == [causal]
    assert (program.contract.kind, cache_misses(fused, sinks=True) == ()) == (
        ("decoder", True) if causal else ("encoder", False)
    )


def test_a_folder_of_such_a_model(tmp_path: Path) -> None:
    _large(hf.GPTJForCausalLM, hf.GPTJConfig(**_GPT, rotary_dim=8)).save_pretrained(tmp_path / "model")
    program, _ = pretrained.capture_pretrained(tmp_path / "model")
    assert "table of its own" in _notes(program)


@pytest.mark.parametrize(
    ("cls", "config"),
    [
        (hf.T5EncoderModel, hf.T5Config(**_T5)),
        (hf.UMT5EncoderModel, hf.UMT5Config(**_T5)),  # its stack has a config of its own
        (hf.MPNetModel, hf.MPNetConfig(**_SIZE)),
    ],
)
def test_position_biases_are_captured(cls: Any, config: Any) -> None:
    """T5's attention was captured without its relative position bias, off by 1.1 of 3.2."""
    register()
    config._attn_implementation = NAME  # as a folder is loaded
    program = capture_model(_large(cls, config))
    assert program.calls(_OPTC) == []
    assert ("position_bias" in _notes(program)) == (cls is not hf.MPNetModel)  # which computes it by itself


def test_chunked_attention_is_captured() -> None:
    """Llama 4's chunks are attention of a kind of their own, which a cache can continue; beside padding they are spelled out."""
    config = hf.Llama4TextConfig(
        **_SIZE, num_key_value_heads=2, intermediate_size=32, intermediate_size_mlp=32, head_dim=16,
        attention_chunk_size=4, num_local_experts=2, layer_types=["chunked_attention"], no_rope_layers=[1],
    )  # fmt: skip
    program = capture_model(_large(hf.Llama4ForCausalLM, config))
    assert _notes(program) == ""
    assert [(layer.chunk, layer.window) for layer in program.contract.layers] == [(4, 0)]
    assert ", chunks of 4" in format_program(program)
    assert cache_misses(program, sinks=True) == ()
    encoder = capture_model(_large(hf.Llama4TextModel, config))
    assert "the attention mask 'chunked_overlay' cannot be expressed" in _notes(encoder)
    assert encoder.calls(_OPTC) == []


# -- experts ------------------------------------------------------------------------------------------


class _Experts(torch.nn.Module):
    """The attributes by which transformers' `use_experts_implementation` says how experts lie."""

    def __init__(self, *, gate: bool, bias: bool, transposed: bool, norm: bool) -> None:
        super().__init__()
        self.num_experts, self.has_gate, self.has_bias = 3, gate, bias
        self.is_transposed, self.has_post_expert_norm, self._is_expert_parallel = transposed, norm, False
        name, rows = ("gate_up_proj", 16) if gate else ("up_proj", 8)
        for key, size in ((name, (rows, 6)), ("down_proj", (6, 8))):
            shape = size[::-1] if transposed else size
            setattr(self, key, torch.nn.Parameter(torch.randn(3, *shape)))
            setattr(self, f"{key}_bias", torch.nn.Parameter(torch.randn(3, size[0])))
        self.act_fn = torch.nn.SiLU()
        self.post_expert_norm = torch.nn.LayerNorm(6)

    def _apply_gate(self, both: torch.Tensor) -> torch.Tensor:
        """Interleaved and clamped, as gpt-oss has it."""
        gate, up = both[..., ::2].clamp(max=1.0), both[..., 1::2].clamp(-1.0, 1.0)
        return (up + 1) * gate * torch.sigmoid(gate * 1.7)


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("norm", [True, False])
def test_layouts_of_experts(gate: bool, bias: bool, transposed: bool, norm: bool) -> None:
    from transformers.integrations.moe import batched_mm_experts_forward

    torch.manual_seed(0)
    module = _Experts(gate=gate, bias=bias, transposed=transposed, norm=norm)
    x, chosen, weights = torch.randn(5, 6), torch.tensor([[0, 2], [1, 0], [2, 1], [1, 2], [0, 1]]), torch.rand(5, 2)
    with torch.no_grad():
        wanted = batched_mm_experts_forward(module, x, chosen, weights)
        torch.testing.assert_close(run_experts(module, x, chosen, weights), wanted, atol=1e-5, rtol=1e-5)


# -- positions that a model counts by itself ----------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "config"),
    [
        (hf.BartForCausalLM, hf.BartConfig(**_BART)),  # learned, two rows further on
        (hf.MarianForCausalLM, hf.MarianConfig(**_BART, decoder_vocab_size=64, pad_token_id=0)),  # sinusoidal
    ],
)
def test_positions_become_an_input(cls: Any, config: Any) -> None:
    model = _large(cls, config)
    program = capture_model(model)
    assert cache_misses(program, sinks=True) == ()  # by trial: a token's logits depend on its id and position alone
    assert program.user_inputs()[1].users


# -- lengths of which torch makes a case of their own ---------------------------------------------------


class _Neighbours(torch.nn.Module):
    """Tokens with those before and behind them, as MobileBERT has it: 2 tokens are a case of their own to torch."""

    def __init__(self, spoiled: bool) -> None:
        super().__init__()
        self.spoiled = spoiled

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pad = torch.nn.functional.pad
        made = torch.cat([pad(x[:, 1:], [0, 0, 0, 1, 0, 0]), x, pad(x[:, :-1], [0, 0, 1, 0, 0, 0])], 2)
        return made + (x.shape[1] == 2 and self.spoiled) * 1.0


class _Encoder(hf.BertModel):
    """A BERT whose embeddings pass through `_Neighbours`."""

    def __init__(self, config: Any, spoiled: bool = False) -> None:
        super().__init__(config, add_pooling_layer=False)
        self.before, self.join = _Neighbours(spoiled), torch.nn.Linear(96, 32)

    def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any = None, **named: Any) -> Any:
        joined = self.join(self.before(self.embeddings.word_embeddings(input_ids)))
        return super().forward(inputs_embeds=joined, attention_mask=attention_mask, **named)


def test_a_length_that_torch_left_out_is_run() -> None:
    program = capture_model(_large(_Encoder, hf.BertConfig(**_SIZE, intermediate_size=32)))
    assert program.proof is not None
    assert program.proof.inputs[-2:] == ("2 tokens, batch 1", "2 tokens, ragged")


def test_a_program_that_is_wrong_at_such_a_length_is_stopped() -> None:
    config = hf.BertConfig(**_SIZE, intermediate_size=32)
    with pytest.raises(GateError, match="the program is not what _Encoder computes") as caught:
        capture_model(_large(lambda config: _Encoder(config, spoiled=True), config))
    assert "2 tokens" in str(caught.value)
