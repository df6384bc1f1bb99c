"""Folders of EAGLE-3 draft models (Li et al. 2025, https://arxiv.org/abs/2503.01840), read as hostile input.

The layout is that of vLLM's speculators: `config.json` with the layer's own config in `transformer_layer_config`, and
`model.safetensors` with

    fc.weight                                  [H, 3 H], of three hidden states of the base side by side
    layers.0.input_layernorm, .hidden_norm     [H], of the next token's embedding and of what `fc` made
    layers.0.self_attn.{q,k,v,o}_proj          q, k and v read both, [.., 2 H]
    layers.0.post_attention_layernorm, layers.0.mlp.{gate,up,down}_proj, norm, lm_head [D, H]
    d2t int64 [D], t2d bool [V]                token d of the draft vocabulary is token d + d2t[d] of the base
    embed_tokens.weight [V, H]                 absent where it is the base's

Other writers put the layer's config at the top, and call the layer `midlayer`; both are read. `draft.json`, a file of
optc's own, says which base and which tokenizer the folder was made for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import msgspec
import torch
from msgspec import Meta
from torch import Tensor

from optc.compiler.diagnostics import InputError, os_errors
from optc.compiler.formats.layouts.tensors import TensorReader
from optc.compiler.formats.safetensors_header import TensorInfo, read_header, shown
from optc.compiler.model_folder.config_file import CONFIG, read_json
from optc.compiler.model_folder.draft_origin import Origin

WEIGHTS = "model.safetensors"
EMBEDDING = "embed_tokens.weight"
ARCHITECTURE = "LlamaForCausalLMEagle3"
STATES = 3
"""Hidden states of the base that the draft model reads."""

_ARCHITECTURES = (ARCHITECTURE, "Eagle3LlamaForCausalLM", "Eagle3Speculator", "Eagle3DraftModel")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_LAYER = "transformer_layer_config"
_REMEDY = "check that config.json and the weights belong together, or use another copy"
_Size = Annotated[int, Meta(ge=1, le=1 << 24)]
_Positive = Annotated[float, Meta(gt=0, lt=1e12)]


class _Rope(msgspec.Struct, frozen=True, kw_only=True):
    rope_type: str = "default"
    rope_theta: _Positive | None = None


class _Layer(msgspec.Struct, frozen=True, kw_only=True):
    """What is read of the layer's config. Keys that would change the computation are read to be refused."""

    hidden_size: _Size
    intermediate_size: _Size
    num_attention_heads: _Size
    num_key_value_heads: _Size | None = None
    head_dim: _Size | None = None
    vocab_size: _Size
    max_position_embeddings: Annotated[int, Meta(ge=1, le=1 << 31)] = 2048
    rms_norm_eps: Annotated[float, Meta(ge=0, lt=1)] = 1e-6
    rope_theta: _Positive | None = None
    rope_parameters: _Rope | None = None
    rope_scaling: dict[str, Any] | None = None
    hidden_act: str = "silu"
    num_hidden_layers: int = 1
    attention_bias: bool = False
    mlp_bias: bool = False


class _Method(msgspec.Struct, frozen=True):
    speculative_tokens: Annotated[int, Meta(ge=1, le=1024)] = 4


class _Verifier(msgspec.Struct, frozen=True):
    name_or_path: str | None = None
    architectures: list[str] = []


class _Speculators(msgspec.Struct, frozen=True):
    proposal_methods: list[_Method] = []
    verifier: _Verifier = _Verifier()


class _Nested(msgspec.Struct, frozen=True):
    eagle_aux_hidden_state_layer_ids: list[int] | None = None


class _Top(msgspec.Struct, frozen=True, kw_only=True):
    """What is read of the rest of config.json."""

    architectures: list[str]
    draft_vocab_size: _Size | None = None
    norm_before_residual: bool | None = None
    norm_before_fc: bool = False
    target_hidden_size: int | None = None
    eagle_aux_hidden_state_layer_ids: list[int] | None = None
    eagle_config: _Nested | None = None
    speculators_config: _Speculators = _Speculators()


class Eagle3Config(msgspec.Struct, frozen=True, kw_only=True):
    """What a draft model computes.

    Attributes:
        hidden_size, vocab_size: the base's, too.
        draft_vocab_size: tokens that can be drafted.
        boundaries: hidden states of the base that are read: j is the residual stream that enters its layer j, 0 the
            embedding.
        norm_before_residual: the residual of the layer is the normed hidden state, not the plain one.
        max_draft_tokens: for which it was made, in a row.
        base, base_architecture: name or folder of the base, and its class; for engines that look for it.
    """

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    boundaries: tuple[int, ...]
    norm_before_residual: bool
    context_length: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_draft_tokens: int = 4
    base: str = ""
    base_architecture: str = ""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every floating tensor but the embedding."""
        hidden, inner, heads, pairs = (
            self.hidden_size,
            self.intermediate_size,
            self.num_attention_heads,
            self.num_key_value_heads,
        )
        layer = {
            "input_layernorm": (hidden,),
            "hidden_norm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "self_attn.q_proj": (heads * self.head_dim, 2 * hidden),
            "self_attn.k_proj": (pairs * self.head_dim, 2 * hidden),
            "self_attn.v_proj": (pairs * self.head_dim, 2 * hidden),
            "self_attn.o_proj": (hidden, heads * self.head_dim),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        return {
            "fc.weight": (hidden, len(self.boundaries) * hidden),
            **{f"layers.0.{name}.weight": shape for name, shape in layer.items()},
            "norm.weight": (hidden,),
            "lm_head.weight": (self.draft_vocab_size, hidden),
        }


@dataclass(frozen=True)
class Eagle3Folder:
    """A folder that was read.

    Attributes:
        tensors: every floating tensor by name, the embedding among them where the folder has its own.
        targets: int64 [D], the base's token of each token that can be drafted; no token twice.
        origin: None where nothing is said of it.
    """

    config: Eagle3Config
    tensors: dict[str, Tensor]
    targets: Tensor
    origin: Origin | None

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read and check a folder.

        Raises:
            InputError: a file that is missing, malformed or damaged; a layer that computes something else; a tensor that is
                missing, of another shape or type, or not finite. It names file, key or tensor.
        """
        config = read_eagle3_config(folder)
        path = folder / WEIGHTS
        if not path.is_file():
            raise InputError("the draft model has no weights", where=str(path), remedy=f"it needs {WEIGHTS}")
        with os_errors("reading the draft model", str(path)):
            headers = _renamed(read_header(path), path)
        expected = config.shapes()
        if EMBEDDING in headers:
            expected[EMBEDDING] = (config.vocab_size, config.hidden_size)
        _check_names(headers, expected, path)
        reader = TensorReader(folder, headers)
        tensors = {name: _finite(reader.read(name, *_FLOATS), name, path) for name in expected}
        return cls(config, tensors, _targets(reader, config, path), Origin.read(folder))


def is_eagle3(folder: Path) -> bool:
    """Whether the config of a folder says that it is an EAGLE-3 draft model."""
    path = folder / CONFIG
    if not path.is_file():
        return False
    config = read_json(path)
    names = config.get("architectures")
    named = isinstance(names, list) and bool(names) and names[0] in _ARCHITECTURES
    return named or config.get("speculators_model_type") == "eagle3"


def read_eagle3_config(folder: Path) -> Eagle3Config:
    """config.json of a folder.

    Raises:
        InputError: missing, malformed, or of a layer that computes something else; names the key.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise InputError(
            "the draft model has no config.json", where=str(folder), remedy="give the folder of a draft model"
        )
    tree = read_json(path)
    try:
        top = msgspec.convert(tree, _Top)
        layer = msgspec.convert(tree.get(_LAYER, tree), _Layer)
    except msgspec.ValidationError as error:
        raise _unusable(path, str(error)) from error
    if not is_eagle3(folder):
        raise _unusable(
            path, f"its architecture is {shown(top.architectures[0]) if top.architectures else 'not named'}"
        )
    _refuse_others(top, layer, path)
    nested = None if top.eagle_config is None else top.eagle_config.eagle_aux_hidden_state_layer_ids
    boundaries = top.eagle_aux_hidden_state_layer_ids or nested or []
    if len(boundaries) != STATES or not all(0 <= number < 1 << 16 for number in boundaries):
        raise _unusable(path, f"eagle_aux_hidden_state_layer_ids names {boundaries[:8]}, not {STATES} layers")
    rope = layer.rope_parameters or _Rope()
    methods, verifier = top.speculators_config.proposal_methods, top.speculators_config.verifier
    assert top.norm_before_residual is not None
    return Eagle3Config(
        hidden_size=layer.hidden_size,
        intermediate_size=layer.intermediate_size,
        num_attention_heads=layer.num_attention_heads,
        num_key_value_heads=layer.num_key_value_heads or layer.num_attention_heads,
        head_dim=layer.head_dim or layer.hidden_size // layer.num_attention_heads,
        vocab_size=layer.vocab_size,
        draft_vocab_size=top.draft_vocab_size or layer.vocab_size,
        boundaries=tuple(boundaries),
        norm_before_residual=top.norm_before_residual,
        context_length=layer.max_position_embeddings,
        rms_norm_eps=layer.rms_norm_eps,
        rope_theta=rope.rope_theta or layer.rope_theta or 10000.0,
        max_draft_tokens=methods[0].speculative_tokens if methods else 4,
        base=verifier.name_or_path or "",
        base_architecture=verifier.architectures[0] if verifier.architectures else "",
    )


def write_eagle3(
    folder: Path,
    config: Eagle3Config,
    tensors: Mapping[str, Tensor],
    targets: Tensor,
    origin: Origin | None,
    *,
    flat: bool = False,
) -> None:
    """Write config.json, model.safetensors and draft.json into a folder that is there.

    Args:
        tensors: those of `Eagle3Config.shapes`, and the embedding where it is not the base's.
        targets: int64 [D], ascending.
        flat: the layer's config at the top, and the layer as `midlayer`, as TensorRT-LLM reads it.

    Raises:
        InputError, ResourceError: they cannot be written.
    """
    from safetensors.torch import save

    kept = {_named(name, flat): tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    offsets = targets.cpu() - torch.arange(config.draft_vocab_size)
    mask = torch.zeros(config.vocab_size, dtype=torch.bool).index_fill_(0, targets.cpu(), True)
    dtype = str(next(iter(kept.values())).dtype).removeprefix("torch.")
    with os_errors("writing the draft model", str(folder)):
        (folder / CONFIG).write_bytes(
            msgspec.json.format(msgspec.json.encode((_flat_tree if flat else _config_tree)(config, dtype)))
        )
        tensors = {**kept, "d2t": offsets, "t2d": mask}
        (folder / WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
        if origin is not None:
            origin.write(folder)


def _named(name: str, flat: bool) -> str:
    return f"midlayer.{name.removeprefix('layers.0.')}" if flat and name.startswith("layers.0.") else name


def _flat_tree(config: Eagle3Config, dtype: str) -> dict[str, Any]:
    """config.json with the layer's config at the top."""
    tree = _config_tree(config, dtype)
    kept = ("architectures", "dtype", "draft_vocab_size", "eagle_aux_hidden_state_layer_ids", "norm_before_residual")
    return {**tree[_LAYER], **{name: tree[name] for name in kept}, "torch_dtype": dtype}


def _config_tree(config: Eagle3Config, dtype: str) -> dict[str, Any]:
    """config.json as vLLM 0.24 reads it: method and number of draft tokens come from `speculators_config`."""
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    layer = {
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": rope,
        "max_position_embeddings": config.context_length,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": False,
    }
    method = {
        "proposal_type": "greedy",
        "speculative_tokens": config.max_draft_tokens,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    verifier = {"name_or_path": config.base, "architectures": [config.base_architecture]}
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "speculators",
        "speculators_model_type": "eagle3",
        "dtype": dtype,
        "draft_vocab_size": config.draft_vocab_size,
        "eagle_aux_hidden_state_layer_ids": list(config.boundaries),
        "norm_before_residual": config.norm_before_residual,
        "target_hidden_size": None,
        "tie_word_embeddings": False,
        _LAYER: layer,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [method],
            "verifier": verifier,
        },
    }


def _refuse_others(top: _Top, layer: _Layer, path: Path) -> None:
    """Refuse a layer that computes something else than this one, and one that does not say which of two it computes."""
    rope = "default" if layer.rope_parameters is None else layer.rope_parameters.rope_type
    scaled = (
        layer.rope_scaling is not None
        and layer.rope_scaling.get("rope_type", layer.rope_scaling.get("type")) != "default"
    )
    width = layer.head_dim or layer.hidden_size // layer.num_attention_heads
    for wrong, why in (
        (top.norm_before_residual is None, "norm_before_residual is missing, and engines take different values then"),
        (top.norm_before_fc, "norm_before_fc is not supported"),
        (top.target_hidden_size not in (None, layer.hidden_size), "target_hidden_size is not hidden_size"),
        (layer.num_hidden_layers != 1, f"num_hidden_layers is {layer.num_hidden_layers}; one layer is supported"),
        (layer.hidden_act != "silu", f"hidden_act is {shown(layer.hidden_act)}; silu is supported"),
        (layer.attention_bias or layer.mlp_bias, "biases are not supported"),
        (rope != "default" or scaled, "rotary embeddings that are scaled are not supported"),
        (width < 2 or width % 2, f"head_dim is {width}, which is odd"),
        (
            layer.num_attention_heads % (layer.num_key_value_heads or 1),
            "num_key_value_heads does not divide num_attention_heads",
        ),
        ((top.draft_vocab_size or 0) > layer.vocab_size, "draft_vocab_size is larger than vocab_size"),
    ):
        if wrong:
            raise _unusable(path, why)


def _renamed(headers: Mapping[str, TensorInfo], path: Path) -> dict[str, TensorInfo]:
    """Headers by the names of `Eagle3Config.shapes`."""
    found: dict[str, TensorInfo] = {}
    for name, info in headers.items():
        own = name.removeprefix("model.")
        own = f"layers.0.{own[9:]}" if own.startswith("midlayer.") else own
        if own in found:
            raise _unusable(path, f"tensor '{shown(name)}' stands twice, as '{shown(own)}'")
        found[own] = info
    return found


def _check_names(headers: Mapping[str, TensorInfo], expected: Mapping[str, tuple[int, ...]], path: Path) -> None:
    for name, shape in expected.items():
        if name not in headers:
            raise _unusable(path, f"tensor '{name}' is missing")
        if headers[name].shape != shape:
            raise _unusable(
                path, f"tensor '{name}' is {list(headers[name].shape)}, config.json describes {list(shape)}"
            )
    spare = sorted(set(headers) - set(expected) - {"d2t", "t2d"})
    if spare:
        raise _unusable(path, f"there is no place for tensor '{shown(spare[0])}'")


def _finite(tensor: Tensor, name: str, path: Path) -> Tensor:
    if not math.isfinite(float(tensor.float().abs().amax())):
        raise InputError(
            f"tensor '{name}' has values that are not finite",
            where=str(path),
            remedy="use another copy: this one was saved from a diverged run, or is damaged",
        )
    return tensor


def _targets(reader: TensorReader, config: Eagle3Config, path: Path) -> Tensor:
    """See `Eagle3Folder.targets`; without `d2t` the two vocabularies are the same."""
    size, whole = config.draft_vocab_size, config.vocab_size
    own = torch.arange(size)
    if "d2t" not in reader:
        if size != whole:
            raise _unusable(path, f"tensor 'd2t' is missing, and the draft vocabulary has {size} of {whole} tokens")
        return own
    if reader.shape("d2t") != (size,):
        raise _unusable(path, f"tensor 'd2t' is {list(reader.shape('d2t'))}, config.json describes [{size}]")
    targets = own + reader.read("d2t", torch.int64)
    # An offset near the end of int64 wraps around, to a number below 0 or beyond the vocabulary.
    if bool(((targets < 0) | (targets >= whole)).any()) or len(targets.unique()) < size:
        raise _unusable(path, f"tensor 'd2t' does not map the draft vocabulary to {size} of {whole} tokens")
    if "t2d" in reader:
        if reader.shape("t2d") != (whole,):
            raise _unusable(path, f"tensor 't2d' is {list(reader.shape('t2d'))}, config.json describes [{whole}]")
        marked = reader.read("t2d", torch.bool)
        if int(marked.sum()) != size or not bool(marked[targets].all()):
            raise _unusable(path, "tensors 'd2t' and 't2d' name different tokens")
    return targets


def _unusable(path: Path, why: str) -> InputError:
    return InputError("the draft model cannot be used", where=str(path), why=why, remedy=_REMEDY)
