"""The model to train: a checked model folder with fp32 weights, or fresh weights in a folder's shape."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch

from optc.compiler.capture.attention import caps_scores
from optc.compiler.capture.facts import stated_context, text_config
from optc.compiler.capture.loading import load_model, meta_model
from optc.compiler.diagnostics import InputError
from optc.compiler.model_folder.checkpoint import CheckpointInfo, check_folder
from optc.compiler.model_folder.config_file import read_config
from optc.training.config import TrainConfig


def load_trainable(config: TrainConfig) -> Any:
    """The transformers model of `config.model` in training mode, fp32, every weight trainable.

    Raises:
        InputError, CaptureError: the folder is unusable, or seq_len is beyond its context.
    """
    folder = Path(config.model)
    if config.from_scratch:
        model = _fresh(folder)
    else:
        model = load_frozen(folder).requires_grad_(True)
    takes = inspect.signature(model.forward).parameters
    if model.get_output_embeddings() is None or "position_ids" not in takes or "labels" not in takes:
        raise InputError(
            f"{type(model).__name__} is not a causal language model that takes position_ids",
            where=config.model,
            remedy="give a decoder with a language-model head, such as LlamaForCausalLM",
        )
    context = stated_context(text_config(model.config))
    if context and config.seq_len > context:
        raise InputError(
            f"seq_len {config.seq_len} is longer than the model's context of {context}",
            where=config.model,
            remedy=f"use --set seq_len={context} or less",
        )
    model.config.use_cache = False
    return model.train()


def load_frozen(folder: Path) -> Any:
    """A model folder in eval mode, fp32, without gradients: a teacher.

    Raises:
        InputError, CaptureError: the folder is unusable.
    """
    attention = attention_for(meta_model(check_folder(folder)))
    model, _ = load_model(folder, dtype=torch.float32, attention=attention)
    return model


def _fresh(folder: Path) -> Any:
    """Weights drawn by the model's own initialization, with torch's seed; the folder needs no weights."""
    if not folder.is_dir():
        raise InputError("the model folder does not exist", where=str(folder), remedy="give a folder with config.json")
    config = read_config(folder, trust_remote_code=None)
    skeleton = meta_model(CheckpointInfo(folder, config, {}, (folder / "tokenizer.json").is_file()))
    shape = skeleton.config
    shape._attn_implementation = attention_for(skeleton)
    return type(skeleton)(shape).float()


def attention_for(skeleton: Any) -> str:
    """sdpa where the model can; a softcap or sinks need the eager implementation."""
    return "sdpa" if skeleton._supports_sdpa and not caps_scores(skeleton.config) else "eager"
