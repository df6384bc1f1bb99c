"""A model folder that is read straight to the second device."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from elsewhere import ELSEWHERE, There, second_device
from hf_folders import quantized, source, write
from safetensors.torch import load_file, save_file

from optc.compiler.capture.loading import load_model
from optc.compiler.diagnostics import InputError
from optc.compiler.model_folder import checkpoint


@pytest.mark.parametrize("layout", [None, "compressed-tensors", "awq", "gptq"])
def test_the_same_tensors(layout: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense or quantized, cast or not: each is on the device, and none was looked at on the CPU."""
    folder = source("llama")
    if layout is not None:
        write(quantized("llama", "int4", half=True), folder, tmp_path / "out", layout)
        folder = tmp_path / "out"
    here, _ = load_model(folder, dtype=torch.bfloat16)
    asked: list[str] = []
    monkeypatch.setattr(checkpoint, "_check_finite", lambda path, name, tensor: asked.append(name))
    with second_device():
        there, _ = load_model(folder, dtype=torch.bfloat16, device=ELSEWHERE)
        found = there.state_dict()
    assert not asked
    for name, tensor in here.state_dict().items():
        other = found[name]
        assert isinstance(other, There)
        assert torch.equal(other.held, tensor), name


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    """In a tensor of the model and in one that it does not have."""
    for name in ("model.layers.0.mlp.up_proj.weight", "extra.weight"):
        folder = tmp_path / name
        shutil.copytree(source("llama"), folder)
        held = load_file(folder / "model.safetensors")
        held["extra.weight"] = torch.ones(3)
        held[name] = held[name].clone()
        held[name].view(-1)[1] = float("nan")
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
        with second_device(), pytest.raises(InputError, match="not finite") as caught:
            load_model(folder, dtype=torch.bfloat16, device=ELSEWHERE)
        assert name in str(caught.value)


def test_a_tied_head_stays_tied() -> None:
    tied = [name for name in ("gemma", "gemma2", "qwen2", "opt") if _tied(name)]
    with second_device():
        model, _ = load_model(source(tied[0]), dtype=torch.float32, device=ELSEWHERE)
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def _tied(name: str) -> bool:
    return bool(json.loads((source(name) / "config.json").read_text()).get("tie_word_embeddings"))
