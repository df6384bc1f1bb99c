"""genai_config.json: what onnxruntime-genai reads of an artifact, and all that may stand in it.

Whoever can change the file could name another model, a library of operators or an execution provider: the manifest's
hash says that it is the file that was published, and this that it is one that optc writes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from optc.compiler.diagnostics import JSON_ERRORS, ArtifactError
from optc.compiler.json_text import unique_keys

FILE_NAME = "genai_config.json"
_MOST_BYTES = 1 << 20
_Count = Annotated[int, Meta(ge=0, le=1 << 40)]
_Id = Annotated[int, Meta(ge=0, le=1 << 31)]


class NoOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """An empty object."""


class CudaProvider(Struct, frozen=True, forbid_unknown_fields=True):
    """ONNX Runtime's own CUDA provider, as it is."""

    cuda: NoOptions


class SessionOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """Level 3, errors: ONNX Runtime would warn of the input that has a default. No provider is the CPU."""

    log_id: Literal["optc"] = "optc"
    log_severity_level: Literal[3] = 3
    provider_options: Annotated[list[CudaProvider], Meta(max_length=1)] = []


class Inputs(Struct, frozen=True, forbid_unknown_fields=True):
    input_ids: Literal["input_ids"] = "input_ids"
    attention_mask: Literal["attention_mask"] = "attention_mask"
    past_key_names: Literal["past_key_values.%d.key"] = "past_key_values.%d.key"
    past_value_names: Literal["past_key_values.%d.value"] = "past_key_values.%d.value"


class Outputs(Struct, frozen=True, forbid_unknown_fields=True):
    logits: Literal["logits"] = "logits"
    present_key_names: Literal["present.%d.key"] = "present.%d.key"
    present_value_names: Literal["present.%d.value"] = "present.%d.value"


class Decoder(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    filename: str
    head_size: _Count
    hidden_size: _Count
    num_attention_heads: _Count
    num_key_value_heads: _Count
    num_hidden_layers: _Count
    session_options: SessionOptions = SessionOptions()
    inputs: Inputs = Inputs()
    outputs: Outputs = Outputs()


class Model(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    type: Annotated[str, Meta(pattern=r"^[a-z0-9_]{1,40}$")]
    bos_token_id: _Id
    eos_token_id: _Id | list[_Id]
    pad_token_id: _Id
    vocab_size: _Count
    context_length: _Count
    decoder: Decoder


class Search(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    max_length: _Count
    do_sample: Literal[False] = False
    past_present_share_buffer: Literal[True] = True


class GenaiConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The config of a decoder with a linear KV cache, as onnxruntime-genai 0.18 takes it."""

    model: Model
    search: Search


def check_genai_config(folder: Path, model: object) -> None:
    """Refuse a config that optc does not write.

    Args:
        model: the file of the graph, as the manifest says it.

    Raises:
        ArtifactError: names the key.
    """
    path = folder / FILE_NAME
    size = path.stat().st_size
    try:
        if size > _MOST_BYTES:
            raise ValueError(f"it has {size} bytes")
        data = path.read_bytes()
        json.loads(data, object_pairs_hook=unique_keys)
        config = msgspec.json.decode(data, type=GenaiConfig)
        if config.model.decoder.filename != model:
            raise ValueError(f"its model is {config.model.decoder.filename[:80]!r}, not the artifact's")
    except JSON_ERRORS as error:
        raise ArtifactError(
            f"{FILE_NAME} is not one that optc writes",
            where=str(path),
            why=str(error),
            remedy="compile the model again; onnxruntime-genai would do what the file says",
        ) from error
