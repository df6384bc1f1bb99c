"""Facts read off a config (for runtimes) and off a graph (for passes)."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Node

from optc.compiler.diagnostics import CaptureError
from optc.compiler.ir.contract import MOST, AttentionFacts, ModelFacts

AUDIO = "input_features"
"""What encoders of sounds take: frames of a spectrogram, [B, mel bands, frames]."""
PIXELS = "pixel_values"
"""What models of pictures take: [B, channels, height, width]."""
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


def attention_facts(node: Node) -> AttentionFacts:
    """The facts of one `optc.attention` call, from its arguments and fake values."""
    q, k, v = (argument.meta["val"] for argument in node.args[:3])
    knobs = node.kwargs
    return AttentionFacts(
        num_heads=int(q.shape[1]),
        num_kv_heads=int(k.shape[1]),
        head_dim=int(q.shape[3]),
        value_dim=int(v.shape[3]),
        scale=float(knobs["scale"]),
        causal=bool(knobs["causal"]),
        window=max(int(knobs["window"]), 0),
        chunk=max(-int(knobs["window"]), 0),
        softcap=float(knobs["softcap"]),
        sinks=len(node.args) > 4 and node.args[4] is not None,
    )


def attention_layers(exported: ExportedProgram) -> tuple[AttentionFacts, ...]:
    """Facts of every `optc.attention` of a graph, in order."""
    op = torch.ops.optc.attention.default
    return tuple(attention_facts(node) for node in exported.graph.nodes if node.target is op)


def model_facts(config: Any, generation: Any = None) -> ModelFacts:
    """What runtimes ask for: ids, vocabulary, context length.

    Args:
        generation: the model's generation config, whose end-of-text ids win: chat models end a turn with another
            token than a text.
    """
    words = text_config(config)
    eos = getattr(generation, "eos_token_id", None)
    eos = _stated(config, words, "eos_token_id") if eos is None else eos
    ids = tuple(eos) if isinstance(eos, list | tuple) else (() if eos is None else (int(eos),))
    return ModelFacts(
        model_type=str(getattr(config, "model_type", "")),
        architecture=str((getattr(config, "architectures", None) or [""])[0]),
        vocab_size=int(getattr(words, "vocab_size", 0)),
        context_length=stated_context(words),
        hidden_size=int(getattr(words, "hidden_size", 0)),
        bos_token_id=_stated(config, words, "bos_token_id"),
        eos_token_ids=ids,
        pad_token_id=_stated(config, words, "pad_token_id"),
    )


def text_config(config: Any) -> Any:
    """The config of the language model: `config` itself, or what the config of a multimodal model nests.

    Raises:
        CaptureError: it nests several, and does not say which of them makes the text.
    """
    if not hasattr(config, "get_text_config"):
        return config  # of no class of transformers, which is not imported for it
    from transformers import PreTrainedConfig

    try:
        nested = config.get_text_config(decoder=True)
    except ValueError as error:
        raise CaptureError(
            "the config nests several language models",
            where="config.json",
            why=str(error),
            remedy="give the language model of it as a folder of its own",
        ) from error
    return nested if isinstance(nested, PreTrainedConfig) else config


def _stated(config: Any, words: Any, name: str) -> Any:
    """A token id of a config, where it has none of its language model's."""
    found = getattr(config, name, None)
    return getattr(words, name, None) if found is None else found


def stated_context(config: Any) -> int:
    """Most tokens of a sequence, as a config says; 0 where it says nothing, or a number that is no limit.

    XLNet says -1; a size that nobody checked may be infinite, or beyond what a contract holds.
    """
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions")
    stated = next((value for name in names if (value := getattr(config, name, None))), None)
    return int(stated) if isinstance(stated, int | float) and 0 < stated <= MOST else 0


def generates_from_an_encoder(made: type) -> bool:
    """Whether a class of transformers is an encoder-decoder model with a head that chooses tokens."""
    if "transformers" not in sys.modules:
        return False  # no class is one of a package that was not imported
    from transformers.generation import GenerationMixin

    if not issubclass(made, GenerationMixin) or not hasattr(made, "forward"):
        return False
    takes = inspect.signature(made.forward).parameters
    return "encoder_outputs" in takes and "decoder_input_ids" in takes  # a decoder alone may take the first


def reads_pictures(made: type) -> bool:
    """Whether a class of transformers takes pictures, alone or beside texts, and does not answer in text."""
    if "transformers" not in sys.modules:
        return False
    from transformers.generation import GenerationMixin

    reads = getattr(made, "main_input_name", None) == PIXELS or reads_both(made)
    return reads and not issubclass(made, GenerationMixin)


def reads_both(made: type) -> bool:
    """Whether a class of transformers compares pictures with texts (CLIP): its forward takes both, each of its own number."""
    takes = inspect.signature(made.forward).parameters  # type: ignore[attr-defined]
    return {PIXELS, "input_ids", "return_loss"} <= set(takes)


def rotary_limit(config: Any) -> int:
    """Most tokens of a sequence for which the rotary frequencies of a config are the same; 0: of any length.

    dynamic (NTK): up to the context that the model was made for. longrope: up to the original context, where it begins to
    take its long factors.

    Raises:
        CaptureError: the config does not say that number.
    """
    words = text_config(config)
    rope = getattr(words, "rope_parameters", None) or {}
    kinds = [rope] if "rope_type" in rope else [value for value in rope.values() if isinstance(value, dict)]
    limits = []
    for kind in kinds:
        if kind.get("rope_type") not in _LENGTH_DEPENDENT_ROPE:
            continue
        is_dynamic = kind["rope_type"] == "dynamic"
        found = stated_context(words) if is_dynamic else kind.get("original_max_position_embeddings")
        if not isinstance(found, int) or found < 1:
            raise CaptureError(
                f"rotary embedding of type '{kind['rope_type']}' without the length up to which it stays as it is",
                where="config.json: rope_parameters",
                why="its frequencies depend on the length of the sequence; one graph serves every length",
                remedy=f"state {'max_position_embeddings' if is_dynamic else 'original_max_position_embeddings there'}",
            )
        limits.append(found)
    return min(limits, default=0)


def refuse_changing_rotary(config: Any) -> None:
    """Refuse what captures of encoder-decoder models do not see to, before any weight is read.

    Raises:
        CaptureError: rotary frequencies that depend on the length of the sequence.
    """
    if rotary_limit(config):
        raise CaptureError(
            "rotary embeddings whose frequencies depend on the length are not supported in encoder-decoder models",
            where="config.json: rope_parameters.rope_type",
            why="one graph serves every length",
            remedy="use default, linear, llama3 or yarn rotary embeddings",
        )
