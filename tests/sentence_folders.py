"""Tiny folders of sentence-transformers: a random BERT, a tokenizer of whole words, and modules behind it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers as hf
from once import once
from safetensors.torch import save_file
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

import optc

WORDS = ["the", "old", "man", "looked", "at", "sea", "and", "a", "boat", "was", "gone", "in", "night", "The", "Old"]
WORDS += ["query", "passage", ":", ".", ","]
WIDTH, CONTEXT = 32, 40
TEXTS = ["the old man looked at the sea .", "a boat", "in the night the old boat was gone , and the man looked at it"]
TANH = "torch.nn.modules.activation.Tanh"
Module = tuple[str, Mapping[str, Any] | None]
MEAN: list[Module] = [
    ("Pooling", {"pooling_mode_mean_tokens": True, "word_embedding_dimension": WIDTH}),
    ("Normalize", None),
]


def whole_folder() -> Path:
    """Two ways of pooling, a Dense module, lengths of 1; lower case, prompts, 16 tokens at most. Read-only."""

    def make(folder: Path) -> None:
        dense = {"in_features": 2 * WIDTH, "out_features": 24, "bias": True, "activation_function": TANH}
        write_sentence_folder(
            folder / "model",
            [("Pooling", {"pooling_mode": ["mean", "cls"]}), ("Dense", dense), ("Normalize", {})],
            settings={"max_seq_length": 16, "do_lower_case": True},
            prompts={"prompts": {"query": "query : ", "document": ""}, "default_prompt_name": "query"},
        )

    return once("sentence-folder", make) / "model"


def embedding_artifact() -> Path:
    """The same for onnx-cpu; read-only."""
    return (
        once("sentence-onnx", lambda folder: optc.compile(whole_folder(), target="onnx-cpu", output=folder / "a")) / "a"
    )


def write_sentence_folder(
    folder: Path,
    modules: Sequence[Module] = MEAN,
    *,
    settings: Mapping[str, Any] | None = None,
    prompts: Mapping[str, Any] | None = None,
    model: Any = None,
) -> Path:
    """Write a folder as sentence-transformers does.

    Args:
        modules: behind the model: last name of the class, and its config.json; None writes none.
        settings: sentence_bert_config.json. prompts: config_sentence_transformers.json.
        model: None is a BERT of two layers.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (tiny_bert() if model is None else model).save_pretrained(folder)
    write_tokenizer(folder)
    entries = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    for index, (name, config) in enumerate(modules, 1):
        place = folder / f"{index}_{name}"
        place.mkdir()
        if config is not None:
            (place / "config.json").write_text(json.dumps(config))
        if name == "Dense" and config is not None:
            _write_dense(place, config, index)
        kind = f"sentence_transformers.models.{name}"
        entries.append({"idx": index, "name": str(index), "path": place.name, "type": kind})
    (folder / "modules.json").write_text(json.dumps(entries))
    for name, found in (("sentence_bert_config.json", settings), ("config_sentence_transformers.json", prompts)):
        if found is not None:
            (folder / name).write_text(json.dumps(found))
    return folder


def tiny_bert() -> Any:
    """Weights large enough that errors show; at some places tokens differ more than texts do."""
    config = hf.BertConfig(
        vocab_size=len(WORDS) + 4,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=CONTEXT,
        pad_token_id=0,
    )
    return randomized(hf.BertModel(config))


def randomized(model: Any) -> Any:
    """The model with large random weights, the same each time."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.ndim > 1 else 0.1
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def write_tokenizer(folder: Path) -> None:
    """tokenizer.json with [CLS] and [SEP] around a text."""
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    core = tokenizers.Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = Whitespace()
    core.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    )
    core.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    core.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "model_max_length": CONTEXT}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _write_dense(place: Path, config: Mapping[str, Any], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, columns = config["out_features"], config["in_features"]
    tensors = {"linear.weight": torch.randn((rows, columns), generator=generator) / columns**0.5}
    if config.get("bias", True):
        tensors["linear.bias"] = torch.randn(rows, generator=generator)
    save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
