"""Decoders whose config and tensor headers say everything that a plan asks: no model of transformers is made of them.

Llama and its likes: an embedding, layers of attention (four linears) and a gated MLP (three) between RMS norms, a head.
A folder is taken for one only where its config has no key beyond those known here, and its tensors are those that the
config implies, name for name and size for size; of any other the model itself is asked.
"""

from __future__ import annotations

from typing import Literal

import msgspec
import torch
from torch import nn

from optc.compiler.model_folder.checkpoint import CheckpointInfo
from optc.compiler.model_folder.config_bounds import check_sizes
from optc.compiler.model_folder.config_file import CONFIG

_Number = int | float
_Ids = int | list[int] | None


class _Rotary(msgspec.Struct, forbid_unknown_fields=True):
    rope_theta: _Number
    rope_type: Literal["default"] = "default"


class PlainConfig(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """Every key that such a config may have, by its names in transformers."""

    model_type: Literal["llama", "mistral", "qwen2", "qwen3"]
    architectures: list[str]
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    head_dim: int | None = None
    hidden_act: Literal["silu"] = "silu"
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    rms_norm_eps: _Number = 1e-6
    rope_theta: _Number | None = None
    rope_scaling: None = None
    rope_parameters: _Rotary | None = None
    attention_dropout: _Number = 0.0
    initializer_range: _Number = 0.02
    pretraining_tp: int = 1
    use_cache: bool = True
    bos_token_id: _Ids = None
    eos_token_id: _Ids = None
    pad_token_id: _Ids = None
    sliding_window: int | None = None
    use_sliding_window: bool = False
    max_window_layers: int | None = None
    layer_types: list[Literal["full_attention", "sliding_attention"]] | None = None
    dtype: str | None = None
    torch_dtype: str | None = None
    transformers_version: str | None = None

    @property
    def head_size(self) -> int:
        """Features of one head."""
        return self.head_dim or self.hidden_size // max(1, self.num_attention_heads)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor of the checkpoint."""
        hidden, table = self.hidden_size, (self.vocab_size, self.hidden_size)
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": table, "model.norm.weight": (hidden,)}
        if not self.tie_word_embeddings:
            found["lm_head.weight"] = table
        for index in range(self.num_hidden_layers):
            found |= {f"model.layers.{index}.{name}": shape for name, shape in self._layer().items()}
        return found

    def _layer(self) -> dict[str, tuple[int, ...]]:
        hidden, wide = self.hidden_size, self.intermediate_size
        queries, keys = (count * self.head_size for count in (self.num_attention_heads, self.num_key_value_heads))
        attention = {"q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, queries)}
        mlp = {"gate": (wide, hidden), "up": (wide, hidden), "down": (hidden, wide)}
        found: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (hidden,)}
        found["post_attention_layernorm.weight"] = (hidden,)
        if self.model_type == "qwen3":
            found |= {f"self_attn.{name}_norm.weight": (self.head_size,) for name in "qk"}
        biased = "qkv" if self.model_type == "qwen2" else "qkvo" * self.attention_bias
        for name, shape in attention.items():
            found |= _linear(f"self_attn.{name}_proj", shape, name in biased)
        for name, shape in mlp.items():
            found |= _linear(f"mlp.{name}_proj", shape, self.mlp_bias)
        return found


def _linear(name: str, shape: tuple[int, int], biased: bool) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": shape} | ({f"{name}.bias": shape[:1]} if biased else {})


class Linear(nn.Linear):
    """One that nobody will fill: to draw its weights, even on the meta device, torch imports its compiler."""

    def reset_parameters(self) -> None:
        """Leave them."""


class Embedding(nn.Embedding):
    """As `Linear`."""

    def reset_parameters(self) -> None:
        """Leave them."""


class PlainDecoder(nn.Module):
    """The linears, the embedding, the head and the norms of such a model on the meta device, under their names."""

    def __init__(self, config: PlainConfig) -> None:
        super().__init__()
        self.config = config
        with torch.device("meta"):
            for name, shape in config.shapes().items():
                self._add(name, shape)
        if config.tie_word_embeddings:
            self.add_module("lm_head", Linear(1, 1, bias=False, device="meta"))
            self.get_output_embeddings().weight = self.get_input_embeddings().weight

    def _add(self, name: str, shape: tuple[int, ...]) -> None:
        path, _, kind = name.rpartition(".")
        *parents, last = path.split(".")
        place: nn.Module = self
        for part in parents:
            if part not in dict(place.named_children()):
                place.add_module(part, nn.Module())
            place = place.get_submodule(part)
        if kind == "weight" and len(shape) == 2:
            made = Embedding(*shape) if last == "embed_tokens" else Linear(shape[1], shape[0], bias=False)
            place.add_module(last, made)
            return
        if last not in dict(place.named_children()):
            place.add_module(last, nn.Module())
        place.get_submodule(last).register_parameter(kind, nn.Parameter(torch.empty(shape)))

    def get_input_embeddings(self) -> nn.Module:
        return self.get_submodule("model.embed_tokens")

    def get_output_embeddings(self) -> nn.Module:
        return self.get_submodule("lm_head")


def plain_decoder(info: CheckpointInfo) -> PlainDecoder | None:
    """The skeleton of a checked folder that is one; None of any other.

    Raises:
        InputError: the config names more layers or larger sizes than the weights could have.
    """
    try:
        config = msgspec.convert(info.config, PlainConfig)
    except msgspec.ValidationError:
        return None
    if config.model_type == "qwen3" and config.head_dim is None:
        return None  # its default is a number, not the share of a head
    if info.trusted or config.architectures != [f"{_CLASSES[config.model_type]}ForCausalLM"]:
        return None
    check_sizes(info.config, info.tensors, info.path / CONFIG)
    if {name: tuple(tensor.shape) for name, tensor in info.tensors.items()} != config.shapes():
        return None
    return PlainDecoder(config)


_CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}
