"""`torchrun -m optc train`: two ranks give the curve and the weights of one process, whatever is split between them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_runs import torchrun

from optc.training.loop import train
from optc.training.metrics import read_log
from optc.training.recipe import load_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
]
STEPS = 4


@pytest.fixture(scope="module")
def recipe(example_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    tree: dict[str, Any] = {
        "model": str(example_model), "data": {"text": [str(example_model.parent / "book.txt")]}, "device": "cpu",
        "max_steps": STEPS, "batch_size": 4, "seq_len": 128, "loss_chunk": 96, "saving": {"every": 0},
    }  # fmt: skip
    path.write_text(json.dumps(tree))  # which is YAML
    return path


@pytest.fixture(scope="module")
def alone(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("alone") / "out"
    train(load_config(str(recipe), values={"output": str(output)}))
    return output


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "deepspeed-2", "deepspeed-3"])
def test_two_ranks_give_the_curve_and_the_weights_of_one_process(
    recipe: Path, alone: Path, tmp_path: Path, kind: str
) -> None:
    kind, _, stage = kind.partition("-")
    settings = [f"parallel.kind={kind}", f"parallel.zero_stage={stage or 2}"]
    if kind == "deepspeed":
        pytest.importorskip("deepspeed", reason="needs the extra `deepspeed`")
    output = tmp_path / "out"
    words = [word for setting in settings for word in ("--set", setting)]
    torchrun(2, "-m", "optc", "train", recipe, *words, "-o", output)
    curves = [[row.loss for row in read_log(folder / "log.jsonl")] for folder in (output, alone)]
    assert len(curves[0]) == STEPS
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)
    found, expected = (load_file(folder / "model.safetensors") for folder in (output, alone))
    assert found.keys() == expected.keys()
    for (
        name,
        tensor,
    ) in expected.items():  # AdamW moves a weight by up to 3e-4 a step, whichever way noise points
        assert found[name].shape == tensor.shape, name
        assert float((found[name] - tensor).abs().mean()) < 1e-5, name


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_resumes(recipe: Path, alone: Path, tmp_path: Path, stage: int) -> None:
    """Two steps, then a process that goes on from their checkpoint."""
    pytest.importorskip("deepspeed", reason="needs the extra `deepspeed`")
    output = tmp_path / "out"
    words = [
        "--set",
        "parallel.kind=deepspeed",
        "--set",
        f"parallel.zero_stage={stage}",
        "--set",
        "schedule.kind=constant",
    ]
    keep = ["--set", "saving.every=2", "--set", "saving.keep_run=true", "-o", output]
    torchrun(2, "-m", "optc", "train", recipe, *words, "--max-steps", 2, *keep)
    shutil.rmtree(output)
    torchrun(2, "-m", "optc", "train", recipe, *words, "--resume", *keep)
    expected = tmp_path / "whole"
    train(load_config(str(recipe), values={"output": str(expected), "schedule.kind": "constant"}))
    curves = [[row.loss for row in read_log(folder / "log.jsonl")] for folder in (output, expected)]
    assert json.loads((output / "train.json").read_text())["resumed_from"] == 2
    assert curves[0] == pytest.approx(curves[1], abs=1e-4)
