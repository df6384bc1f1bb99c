"""genai_config.json: what onnxruntime-genai needs to load the folder unmodified.

It rejects unknown keys, so optc's own facts stay in the manifest.
"""

from __future__ import annotations

from optc.compiler.artifact.genai_config import (
    CudaProvider,
    Decoder,
    GenaiConfig,
    Model,
    NoOptions,
    Search,
    SessionOptions,
)
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


def genai_config(contract: Contract, filename: str, *, cuda: bool = False) -> GenaiConfig:
    """The config of a decoder, for the CPU or for ONNX Runtime's CUDA provider."""
    model, layer = contract.model, contract.layers[0]
    ids = list(model.eos_token_ids) or [0]
    first_eos = ids[0]
    context = model.context_length or 4096
    return GenaiConfig(
        model=Model(
            # gpt2 there means a combined KV cache of its own; ours is the common one
            type=model.model_type if model.model_type in _TYPES - {"gpt2"} else "decoder",
            bos_token_id=model.bos_token_id if model.bos_token_id is not None else first_eos,
            eos_token_id=first_eos if len(ids) == 1 else ids,
            pad_token_id=model.pad_token_id if model.pad_token_id is not None else first_eos,
            vocab_size=model.vocab_size,
            context_length=context,
            decoder=Decoder(
                filename=filename,
                head_size=layer.head_dim,
                hidden_size=model.hidden_size or layer.num_heads * layer.head_dim,
                num_attention_heads=layer.num_heads,
                num_key_value_heads=layer.num_kv_heads,
                num_hidden_layers=len(contract.layers),
                session_options=SessionOptions(provider_options=[CudaProvider(cuda=NoOptions())] if cuda else []),
            ),
        ),
        search=Search(max_length=context),
    )


def differing_layers(contract: Contract) -> str:
    """What genai_config.json cannot say of the layers, which it describes once for all of them; "" where it can."""
    if contract.keeps_states:
        return "recurrent layers keep states beside keys and values"
    shapes = sorted({(layer.num_kv_heads, layer.head_dim) for layer in contract.layers})
    if len(shapes) < 2:
        return ""
    return "layers differ in KV heads and head sizes, " + ", ".join(f"{heads} of {size}" for heads, size in shapes)
