"""Folders of EAGLE-3 draft models: written and read back, other writers' names, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EXAMPLE
from eagle3_models import SHAPE, small_draft, some_targets
from safetensors.torch import load_file, save_file
from torch import Tensor

from optc.compiler.capture.eagle3 import check_base
from optc.compiler.diagnostics import InputError
from optc.compiler.model_folder.draft_origin import Origin
from optc.compiler.model_folder.eagle3 import Eagle3Folder, is_eagle3, read_eagle3_config, write_eagle3

ORIGIN = Origin(config="a" * 64, weights="b" * 64, tokenizer="")


def written(folder: Path) -> Path:
    write_eagle3(folder, SHAPE, small_draft().tensors(), some_targets(), ORIGIN)
    return folder


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    found = Eagle3Folder.read(written(tmp_path))
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1, "for all who read the folder"
    assert found.config == SHAPE
    assert torch.equal(found.targets, some_targets())
    assert found.origin == ORIGIN
    expected = small_draft().tensors()
    assert found.tensors.keys() == expected.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.items())


def test_the_layout_is_that_of_vllm(tmp_path: Path) -> None:
    """Keys and names that vLLM 0.24 reads: `transformers_utils/configs/speculators`, `models/llama_eagle3.py`."""
    config, tensors = (
        json.loads((written(tmp_path) / "config.json").read_text()),
        load_file(tmp_path / "model.safetensors"),
    )
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["speculators_model_type"] == "eagle3"
    assert config["norm_before_residual"] is True
    assert config["eagle_aux_hidden_state_layer_ids"] == [0, 1, 2]
    assert config["draft_vocab_size"] == 20
    assert config["transformer_layer_config"]["num_hidden_layers"] == 1
    assert config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 4
    assert tensors["layers.0.self_attn.q_proj.weight"].shape == (16, 32)
    assert tensors["fc.weight"].shape == (16, 48)
    assert tensors["d2t"].dtype == torch.int64
    assert torch.equal(tensors["d2t"] + torch.arange(20), some_targets())
    assert torch.equal(tensors["t2d"].nonzero()[:, 0], some_targets())


def test_folders_of_other_writers(tmp_path: Path) -> None:
    """The layer's config at the top, the layer as `midlayer`, a whole vocabulary, an embedding of its own."""
    model = small_draft(draft_vocab_size=50)
    write_eagle3(tmp_path, model.config, model.tensors(), torch.arange(50), None)
    config = json.loads((tmp_path / "config.json").read_text())
    layer = config.pop("transformer_layer_config")
    del config["speculators_config"], config["speculators_model_type"], layer["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps({**layer, **config, "draft_vocab_size": None}))
    tensors = load_file(tmp_path / "model.safetensors")
    others = {
        name.replace("layers.0.", "midlayer."): item for name, item in tensors.items() if name not in ("d2t", "t2d")
    }
    save_file({**others, "embed_tokens.weight": torch.ones(50, 16)}, tmp_path / "model.safetensors")
    found = Eagle3Folder.read(tmp_path)
    assert found.config == model.config
    assert found.origin is None
    assert torch.equal(found.tensors["embed_tokens.weight"], torch.ones(50, 16))
    assert torch.equal(found.targets, torch.arange(50))


def edited(key: str, value: Any, group: str | None = None) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    def edit(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tree = config if group is None else config[group]
        if value is None:
            del tree[key]
        else:
            tree[key] = value

    return edit


def put(name: str, value: Tensor | None) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    def edit(config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value

    return edit


LAYER = "transformer_layer_config"
BAD = [
    (edited("norm_before_residual", None), "norm_before_residual is missing"),
    (edited("norm_before_fc", True), "norm_before_fc is not supported"),
    (edited("architectures", ["LlamaForCausalLM"]), ""),
    (edited("architectures", 3), "Expected `array`"),
    (edited("eagle_aux_hidden_state_layer_ids", [1, 2]), r"names \[1, 2\], not 3 layers"),
    (edited("eagle_aux_hidden_state_layer_ids", [1, 2, -1]), "not 3 layers"),
    (edited("draft_vocab_size", 21), r"tensor 'lm_head.weight' is \[20, 16\], config.json describes \[21, 16\]"),
    (edited("draft_vocab_size", 51), "larger than vocab_size"),
    (edited("hidden_size", 1 << 40, LAYER), "Expected `int` <="),
    (edited("hidden_size", 0, LAYER), "Expected `int` >= 1"),
    (edited("num_hidden_layers", 2, LAYER), "one layer is supported"),
    (edited("hidden_act", "relu", LAYER), "hidden_act is relu"),
    (edited("attention_bias", True, LAYER), "biases are not supported"),
    (edited("rope_scaling", {"type": "linear", "factor": 2}, LAYER), "rotary embeddings that are scaled"),
    (edited("rope_theta", "many", LAYER), "Expected `float"),
    (edited("num_key_value_heads", 3, LAYER), "does not divide"),
    (edited("head_dim", 5, LAYER), "head_dim is 5, which is odd"),
    (put("fc.weight", None), "tensor 'fc.weight' is missing"),
    (put("fc.weight", torch.zeros(16, 32)), r"tensor 'fc.weight' is \[16, 32\], config.json describes \[16, 48\]"),
    (put("norm.weight", torch.full((16,), torch.nan)), "not finite"),
    (put("norm.weight", torch.zeros(16, dtype=torch.int64)), "wrong type"),
    (put("layers.1.mlp.up_proj.weight", torch.zeros(1)), "no place for tensor 'layers.1.mlp.up_proj.weight'"),
    (put("midlayer.hidden_norm.weight", torch.zeros(16)), "stands twice"),
    (put("d2t", None), "tensor 'd2t' is missing"),
    (put("d2t", torch.zeros(19, dtype=torch.int64)), r"tensor 'd2t' is \[19\]"),
    (put("d2t", torch.arange(0, -20, -1)), "does not map the draft vocabulary"),
    (put("d2t", torch.full((20,), 31)), "does not map the draft vocabulary"),
    (put("d2t", torch.full((20,), 2**63 - 1)), "does not map the draft vocabulary"),
    (put("t2d", torch.ones(50, dtype=torch.bool)), "name different tokens"),
    (put("t2d", torch.ones(49, dtype=torch.bool)), r"tensor 't2d' is \[49\]"),
    (put("embed_tokens.weight", torch.ones(49, 16)), r"'embed_tokens.weight' is \[49, 16\]"),
]


@pytest.mark.parametrize(("edit", "message"), BAD)
def test_what_does_not_fit_is_refused(edit: Any, message: str, tmp_path: Path) -> None:
    config, tensors = (
        json.loads((written(tmp_path) / "config.json").read_text()),
        load_file(tmp_path / "model.safetensors"),
    )
    edit(config, tensors)
    if not message:  # an architecture that says otherwise is overruled by speculators_model_type
        del config["speculators_model_type"]
        message = "its architecture is LlamaForCausalLM"
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=message):
        Eagle3Folder.read(tmp_path)


def test_files_that_are_missing_or_damaged(tmp_path: Path) -> None:
    assert not is_eagle3(tmp_path)
    with pytest.raises(InputError, match=r"no config\.json"):
        read_eagle3_config(tmp_path)
    (written(tmp_path) / "draft.json").write_text('{"config": "x"}')
    with pytest.raises(InputError, match="draft model cannot be used"):
        Eagle3Folder.read(tmp_path)
    (tmp_path / "draft.json").unlink()
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[:-4])
    with pytest.raises(InputError, match="damaged"):
        Eagle3Folder.read(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no weights"):
        Eagle3Folder.read(tmp_path)


def test_the_example_is_of_its_base() -> None:
    """Its hashes are those of the model beside it."""
    found = Eagle3Folder.read(EXAMPLE.parent / "fiction-3m-eagle3")
    assert found.origin is not None
    check_base(found, EXAMPLE)
