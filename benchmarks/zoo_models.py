"""Tiny random models of every text type of the installed transformers: which there are, and how small each is made.

Sizes are given by the names of a config's fields, so that a type that a later transformers brings is built too.
"""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass
from typing import Any

MOST_PARAMETERS = 8_000_000
"""A model beyond this has a size that the fields below do not reach: it is not built."""

_NUMBERS = """
1: n_group topk_group n_groups num_memory_blocks first_k_dense_replace mamba_n_groups num_shared_experts
1: n_shared_experts mtp_num_hidden_layers num_nextn_predict_layers num_mem_blocks hybrid_layer_id
1: num_zero_experts num_feedforward_networks
2: num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_key_value_heads
2: num_kv_heads multi_query_group_num num_experts_per_tok moe_k top_k moe_topk n_ssm_groups
2: moe_num_shared_experts num_encoder_layers num_decoder_layers num_local_attention_heads_kv
2: num_global_key_value_heads
4: num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_experts
4: num_local_experts n_routed_experts moe_num_experts linear_num_value_heads linear_num_key_heads conv_kernel
4: conv_L_cache
8: sliding_window attention_window window_size local_attention attention_chunk_size mamba_d_state
8: ssm_state_size state_size rotary_dim qk_rope_head_dim mamba_n_heads mamba_num_heads chunk_size
8: mamba_chunk_size hidden_size_per_layer_input index_topk time_step_rank mamba_d_head time_mix_extra_dim
8: mamba_dt_rank
16: head_dim kv_channels qk_nope_head_dim v_head_dim linear_key_head_dim linear_value_head_dim mamba_head_dim
16: global_head_dim index_head_dim attention_key_hidden_size d_kv
32: kv_lora_rank q_lora_rank moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size
32: index_n_heads embedding_size moe_shared_expert_intermediate_size shared_intermediate_size moe_shared_intermediate_size
64: hidden_size n_embd d_model dim block_out_channels word_embed_proj_dim embed_dim lru_width
64: attention_hidden_size emb_dim
128: intermediate_size ffn_dim d_ff n_inner ffn_hidden_size encoder_ffn_dim decoder_ffn_dim vocab_size
128: hidden_dim max_position_embeddings n_positions max_seq_len n_ctx vocab_size_per_layer_input
128: intermediate_size_mlp dense_intermediate_size block_multiple_of context_length max_length dim_ff
128: max_source_positions max_target_positions unpadded_vocab_size
"""
SIZES = {name: int(row.split(":")[0]) for row in _NUMBERS.strip().splitlines() for name in row.split(":")[1].split()}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1}

LEFT_OUT = object()
"""In `SPECIAL`: the class's own default stays."""
_SECTIONS = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text", "glm4v_text", "glm_image_text", "glm_ocr_text"), _SECTIONS),
    "xmod": {"default_language": "en_XX"},
    **{key: {"pad_index": 0, "bos_index": 1, "eos_index": 2} for key in ("flaubert", "xlm")},
    "glm5_next_text": {"num_key_value_heads": 4, "index_kpool": 4},
    "longcat_flash": {"head_dim": 8, "num_layers": 1, "zero_expert_num": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "bamba": {"mamba_d_head": 16, "attn_layer_indices": [1]},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8},
        "ffn_config": {"ffn_hidden_size": 128, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots3_note_text": {"num_key_value_heads": 4},
    "esmc": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_head": 16, "mamba_d_ssm": 128},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_d_head": 16, "layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "luke": {"entity_vocab_size": 16, "entity_emb_size": 32},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "reformer": {
        "axial_pos_embds_dim": [16, 48],
        "axial_pos_shape": [8, 16],
        "attn_layers": ["local", "lsh"],
        "lsh_attn_chunk_length": 8,
        "local_attn_chunk_length": 8,
    },
    "roc_bert": {
        "pronunciation_vocab_size": 32,
        "shape_vocab_size": 32,
        "pronunciation_embed_dim": 16,
        "shape_embed_dim": 16,
    },
    "squeezebert": {"embedding_size": 64},
    "zaya": {"num_experts_per_tok": 1},
}
"""What single types need to be consistent, or to have one layer of each kind."""


@dataclass(frozen=True)
class Kind:
    """A model type under one head: causal (logits of the next token), masked, encoder (hidden states); picture, answers (see
    zoo_pictures.py)."""

    head: str
    type: str
    architecture: str

    @property
    def name(self) -> str:
        return f"{self.head}:{self.type}"


def kinds() -> list[Kind]:
    """Every type that reads token ids: causal and masked ones by transformers' own lists; encoders are the other text
    models that it lists, without a head."""
    from transformers.models.auto import modeling_auto as auto

    found = [
        Kind(head, name, architecture)
        for head, table in (
            ("causal", auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
            ("masked", auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
        )
        for name, architecture in table.items()
    ]
    known = {kind.type for kind in found}
    encoders = dict(auto.MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES)
    for name, architecture in auto.MODEL_MAPPING_NAMES.items():
        first = architecture if isinstance(architecture, str) else architecture[0]
        if name not in known and name not in encoders and _reads_text(name, first):
            encoders[name] = first
    return found + [Kind("encoder", name, architecture) for name, architecture in encoders.items()]


def _reads_text(name: str, architecture: str) -> bool:
    import transformers

    if name not in transformers.CONFIG_MAPPING:
        return False
    config = transformers.CONFIG_MAPPING[name]
    if config.sub_configs or "vocab_size" not in inspect.signature(config.__init__).parameters:
        return False
    return getattr(getattr(transformers, architecture, None), "main_input_name", "") == "input_ids"


def tiny_config(cls: Any, special: dict[str, Any]) -> Any:
    """A small config of a class; configs that it nests are made small too.

    Args:
        special: fields to set beside; names of nested configs hold theirs.
    """
    fields = inspect.signature(cls.__init__).parameters
    given: dict[str, Any] = {name: size for name, size in SIZES.items() if name in fields}
    if "kv_lora_rank" in fields:  # latent attention has a key of its own for every query head
        given["num_key_value_heads"] = SIZES["num_attention_heads"]
    given |= TOKENS
    for name, nested in (cls.sub_configs or {}).items():
        if inspect.isclass(nested) and hasattr(nested, "sub_configs"):
            given[name] = tiny_config(nested, special.get(name, {})).to_dict()
            given[name].pop("transformers_version", None)
    given |= _one_layer_of_each(cls)
    given |= {name: value for name, value in special.items() if name not in (cls.sub_configs or {})}
    given = {name: value for name, value in given.items() if value is not LEFT_OUT}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cls(**given)


def _one_layer_of_each(cls: Any) -> dict[str, Any]:
    """Layer kinds so that each that the class's own default has is there once, and two layers at least."""
    fields = inspect.signature(cls.__init__).parameters
    lists = [name for name in ("layer_types", "mlp_layer_types") if name in fields and fields[name].default is None]
    if not lists or "num_hidden_layers" not in fields:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = cls()
    found = {name: list(dict.fromkeys(getattr(whole, name, None) or ())) for name in lists}
    count = max(2, *(len(kinds) for kinds in found.values()))
    if count == 2 and all(len(kinds) < 2 for kinds in found.values()):
        return {}
    layers = {name: [kinds[i % len(kinds)] for i in range(count)] for name, kinds in found.items() if kinds}
    return {"num_hidden_layers": count, **layers}


def build(kind: Kind, seed: int = 0) -> Any:
    """The tiny random model of a text type; raises as `build_of`."""
    import transformers
    from transformers import CONFIG_MAPPING

    cls = getattr(transformers, kind.architecture)
    config = tiny_config(CONFIG_MAPPING[kind.type], SPECIAL.get(kind.type, {}))
    if not isinstance(config, cls.config_class):  # the text model of a type that nests it
        config = config.get_text_config()
    for name in ("is_decoder", "causal"):
        if kind.head == "causal" and hasattr(config, name):
            setattr(config, name, True)
    return build_of(kind, config, seed)


def build_of(kind: Kind, config: Any, seed: int = 0) -> Any:
    """The random model of a config, in eval mode and float32, with weights large enough that errors show.

    Raises:
        ValueError: its config does not get small. Whatever else transformers raises comes through.
    """
    import torch
    import transformers

    cls = getattr(transformers, kind.architecture)
    config._attn_implementation = "eager"
    with torch.device("meta"):
        count = sum(weight.numel() for weight in cls(config).parameters())
    if count > MOST_PARAMETERS:
        raise ValueError(f"{count} parameters")
    torch.manual_seed(seed)
    model = cls(config).float().eval().requires_grad_(False)
    _stir(model)
    return model


def _stir(model: Any) -> None:
    """Spread matrices, and vectors that a fresh model has at zero or one."""
    import torch

    for weight in model.parameters():
        if weight.ndim > 1:
            deviation = float(weight.std()) if weight.numel() > 1 else 0.0
            target = min(0.5, 1.5 * weight.shape[-1] ** -0.5)
            if 0 < deviation < target:
                weight.mul_(target / deviation)
            elif deviation == 0:
                weight.add_(torch.randn_like(weight) * 0.05)
        else:
            weight.add_(torch.randn_like(weight) * 0.05)
