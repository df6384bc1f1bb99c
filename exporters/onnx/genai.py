"""genai_config.json: what onnxruntime-genai needs to load the folder unmodified.

It rejects unknown keys, so optc's own facts stay in the manifest.
"""

from __future__ import annotations

from typing import Any

from optc.compiler.ir.contract import Contract

# Decoder types that onnxruntime-genai 0.18 lists; any other decoder is "decoder" to it.
_TYPES = frozenset(
    {
        "chatglm",
        "ernie4_5",
        "gemma",
        "gemma2",
        "gemma3_text",
        "gpt2",
        "granite",
        "internlm2",
        "llama",
        "mistral",
        "nemotron",
        "olmo",
        "phi",
        "phi3",
        "phimoe",
        "phi3small",
        "qwen2",
        "qwen3",
        "smollm3",
    }
)


def genai_config(contract: Contract, filename: str) -> dict[str, Any]:
    """The config of a decoder with a linear KV cache, as onnxruntime-genai 0.18 takes it."""
    model, layer = contract.model, contract.layers[0]
    eos: Any = list(model.eos_token_ids)
    eos = eos[0] if len(eos) == 1 else eos or 0
    first_eos = eos[0] if isinstance(eos, list) else eos
    context = model.context_length or 4096
    # gpt2 there means a combined KV cache of its own; ours is the common one
    kind = model.model_type if model.model_type in _TYPES - {"gpt2"} else "decoder"
    return {
        "model": {
            "type": kind,
            "bos_token_id": model.bos_token_id if model.bos_token_id is not None else first_eos,
            "eos_token_id": eos,
            "pad_token_id": model.pad_token_id if model.pad_token_id is not None else first_eos,
            "vocab_size": model.vocab_size,
            "context_length": context,
            "decoder": {
                "filename": filename,
                "head_size": layer.head_dim,
                "hidden_size": model.hidden_size or layer.num_heads * layer.head_dim,
                "num_attention_heads": layer.num_heads,
                "num_key_value_heads": layer.num_kv_heads,
                "num_hidden_layers": len(contract.layers),
                # level 3, errors: ONNX Runtime would warn of the input that has a default
                "session_options": {"log_id": "optc", "log_severity_level": 3, "provider_options": []},
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {"max_length": context, "do_sample": False, "past_present_share_buffer": True},
    }
