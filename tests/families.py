"""Tiny random models of the families that optc promises to take."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf

_SIZE: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GQA: dict[str, Any] = {**_SIZE, "num_key_value_heads": 2, "intermediate_size": 128}
_GPT2: dict[str, Any] = {
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 128,
    "n_positions": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_OPT: dict[str, Any] = {**_SIZE, "ffn_dim": 128, "word_embed_proj_dim": 64}

FAMILIES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, _GQA),
    "qwen2": (hf.Qwen2ForCausalLM, hf.Qwen2Config, _GQA),
    "qwen2-window": (
        hf.Qwen2ForCausalLM,
        hf.Qwen2Config,
        {**_GQA, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config, {**_GQA, "head_dim": 16}),
    "mistral": (hf.MistralForCausalLM, hf.MistralConfig, {**_GQA, "sliding_window": 8}),
    "gemma": (hf.GemmaForCausalLM, hf.GemmaConfig, {**_GQA, "head_dim": 16}),
    "gemma2": (hf.Gemma2ForCausalLM, hf.Gemma2Config, {**_GQA, "head_dim": 16, "sliding_window": 8}),
    "gemma3": (hf.Gemma3ForCausalLM, hf.Gemma3TextConfig, {**_GQA, "head_dim": 16, "sliding_window": 8}),
    "phi": (hf.PhiForCausalLM, hf.PhiConfig, _GQA),
    "phi3": (hf.Phi3ForCausalLM, hf.Phi3Config, _GQA),
    "gpt2": (hf.GPT2LMHeadModel, hf.GPT2Config, _GPT2),
    "opt": (hf.OPTForCausalLM, hf.OPTConfig, _OPT),
    "gpt-neox": (hf.GPTNeoXForCausalLM, hf.GPTNeoXConfig, {**_SIZE, "intermediate_size": 128}),
    "granite": (hf.GraniteForCausalLM, hf.GraniteConfig, _GQA),
    "olmo2": (hf.Olmo2ForCausalLM, hf.Olmo2Config, _GQA),
    "mixtral": (hf.MixtralForCausalLM, hf.MixtralConfig, {**_GQA, "num_local_experts": 4}),
    "bert": (hf.BertForMaskedLM, hf.BertConfig, {**_SIZE, "intermediate_size": 128}),
}
DECODERS = [name for name in FAMILIES if name != "bert"]


def make_model(name: str, *, attention: str = "eager", seed: int = 0, layers: int = 2) -> Any:
    """A tiny model in eval mode, fp32, with weights large enough that errors show."""
    cls, config_cls, sizes = FAMILIES[name]
    config = config_cls(**{**sizes, "n_layer" if "n_layer" in sizes else "num_hidden_layers": layers})
    config._attn_implementation = attention
    torch.manual_seed(seed)
    model = cls(config).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    return model
