"""Folders for vLLM and TensorRT-LLM that carry a draft model of EAGLE-3, and name it in their serving options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from chosen import chosen
from eagle3_models import FOR_LLAMA, small_draft, some_targets
from hf_folders import source
from modelopt_folders import write
from safetensors import safe_open
from safetensors.torch import load_file
from stages import captured

import optc
from optc.compiler.diagnostics import InputError, TargetError, UsageError
from optc.compiler.model_folder.checkpoint import check_folder
from optc.compiler.model_folder.draft_origin import Origin
from optc.compiler.model_folder.eagle3 import Eagle3Folder, write_eagle3


def draft_folder(place: Path, *, origin: Origin | None = None, **changes: Any) -> Path:
    """A draft model for the tiny Llama, which says what it was made for."""
    model = small_draft(**{**FOR_LLAMA, "norm_before_residual": False, "boundaries": (1, 2, 2), **changes})
    place.mkdir()
    made_for = origin or Origin.of(check_folder(source("llama")))
    write_eagle3(place, model.config, model.tensors(), some_targets(model.config), made_for)
    return place


def test_vllm_gets_the_layout_of_speculators(tmp_path: Path) -> None:
    made = draft_folder(tmp_path / "made", norm_before_residual=True, boundaries=(0, 1, 1))
    result = optc.compile(
        source("llama"), target="vllm", speculative=f"eagle3:{made}", draft_tokens=3, output=tmp_path / "out"
    )
    told = yaml.safe_load((tmp_path / "out" / "serve.yaml").read_text())
    assert json.loads(told["speculative-config"]) == {
        "method": "eagle3",
        "model": "draft",
        "num_speculative_tokens": 3,
    }
    assert result.manifest.engine_info["serving_options"] == "serve.yaml"
    assert {"draft/config.json", "draft/model.safetensors", "draft/draft.json"} <= {
        item.path for item in result.manifest.files
    }
    assert (tmp_path / "out" / "draft" / "config.json").read_text() == (made / "config.json").read_text()
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out" / "draft", made))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_trtllm_gets_the_layer_at_the_top(tmp_path: Path) -> None:
    """Names, config and layers as its loader reads them; read again, it is the same draft model."""
    made = draft_folder(tmp_path / "made")
    write(captured("llama"), source("llama"), tmp_path / "out", speculative=f"eagle3:{made}")
    told = yaml.safe_load((tmp_path / "out" / "serve.yaml").read_text())
    assert told["speculative_config"] == {
        "decoding_type": "Eagle3",
        "max_draft_len": 4,
        "speculative_model_dir": "draft",
        "eagle3_layers_to_capture": [0, 1, 1],
    }
    config = json.loads((tmp_path / "out" / "draft" / "config.json").read_text())
    assert (config["architectures"], config["model_type"]) == (["LlamaForCausalLMEagle3"], "llama")
    assert (config["hidden_size"], config["draft_vocab_size"], config["num_hidden_layers"]) == (64, 90, 1)
    assert "target_hidden_size" not in config
    with safe_open(tmp_path / "out" / "draft" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {"fc.weight", "midlayer.hidden_norm.weight", "midlayer.self_attn.q_proj.weight", "d2t"} <= names
    assert not [name for name in names if name.startswith("layers.")]
    again, before = Eagle3Folder.read(tmp_path / "out" / "draft"), Eagle3Folder.read(made)
    assert again.config == before.config
    assert torch.equal(again.targets, before.targets)
    assert all(torch.equal(again.tensors[name], before.tensors[name]) for name in before.tensors)


def test_what_cannot_be_carried_is_refused_before_anything_is_captured(tmp_path: Path) -> None:
    normed = draft_folder(tmp_path / "normed", norm_before_residual=True)
    embedding = draft_folder(tmp_path / "embedding", boundaries=(0, 1, 2))
    other = draft_folder(tmp_path / "other", origin=Origin(config="", weights="1" * 64, tokenizer=""))
    for target, folder, error, text in (
        ("trtllm", normed, TargetError, "it adds the normed state"),
        ("trtllm", embedding, TargetError, "it reads the embedding"),
        ("vllm", other, InputError, "the draft model was trained on 111111111111"),
        ("vllm", tmp_path / "nowhere", InputError, "has no config.json"),
    ):
        with pytest.raises(error) as caught:
            optc.compile(source("llama"), target=target, speculative=f"eagle3:{folder}", output=tmp_path / "out")
        assert text in str(caught.value)
        assert caught.value.remedy
    with pytest.raises(UsageError, match="--draft-tokens 5 is more than the 4"):
        optc.compile(
            source("llama"), target="vllm", speculative=f"eagle3:{normed}", draft_tokens=5, output=tmp_path / "out"
        )
    assert not (tmp_path / "out").exists()


def test_what_vllm_is_told_of_others(tmp_path: Path) -> None:
    for name, method, expected in (
        ("a", "ngram", {"method": "ngram", "prompt_lookup_max": 4, "num_speculative_tokens": 4}),
        ("b", "draft:/models/small", {"method": "draft_model", "model": "/models/small", "num_speculative_tokens": 4}),
    ):
        optc.compile(source("llama"), target="vllm", speculative=method, output=tmp_path / name)
        told = yaml.safe_load((tmp_path / name / "serve.yaml").read_text())
        assert json.loads(told["speculative-config"]) == expected
    with pytest.raises(UsageError, match="--speculative eagle3: names no model"):
        chosen("vllm", speculative="eagle3:")
    with pytest.raises(UsageError, match="unknown speculative decoding 'eagle3'"):
        chosen("vllm", speculative="eagle3")
