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
        "model": str(example_model),
        "data": {"text": [str(example_model.parent / "book.txt")]},
        "device": "cpu",
        "max_steps": STEPS,
        "batch_size": 4,
        "seq_len": 128,
        "loss_chunk": 96,
        "saving": {"every": 0},
        "schedule": {"kind": "constant"},  # of a shorter run, too
    }
    path.write_text(json.dumps(tree))  # which is YAML
    return path


@pytest.fixture(scope="module")
def alone(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("alone") / "out"
    train(load_config(str(recipe), values={"output": str(output)}))
    return output


def run(recipe: Path, output: Path, *flags: object, **settings: object) -> None:
    """The command on two ranks."""
    words = [word for key, value in settings.items() for word in ("--set", f"{key.replace('__', '.')}={value}")]
    torchrun(2, "-m", "optc", "train", recipe, *words, *flags, "-o", output)


def losses(folder: Path) -> list[float | None]:
    return [row.loss for row in read_log(folder / "log.jsonl")]


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "deepspeed-2", "deepspeed-3"])
def test_two_ranks_give_the_curve_and_the_weights_of_one_process(
    recipe: Path, alone: Path, tmp_path: Path, kind: str
) -> None:
    kind, _, stage = kind.partition("-")
    if kind == "deepspeed":
        pytest.importorskip("deepspeed", reason="needs the extra `deepspeed`")
    output = tmp_path / "out"
    run(recipe, output, parallel__kind=kind, parallel__zero_stage=stage or 2)
    assert len(losses(output)) == STEPS
    assert losses(output) == pytest.approx(losses(alone), abs=1e-5)
    found, expected = (load_file(folder / "model.safetensors") for folder in (output, alone))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape, name
        # AdamW moves a weight by up to 3e-4 a step, whichever way noise points.
        assert float((found[name] - tensor).abs().mean()) < 1e-5, name


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_resumes(recipe: Path, alone: Path, tmp_path: Path, stage: int) -> None:
    """Two steps, then processes that go on from their checkpoint."""
    pytest.importorskip("deepspeed", reason="needs the extra `deepspeed`")
    output = tmp_path / "out"
    settings = {
        "parallel__kind": "deepspeed",
        "parallel__zero_stage": stage,
        "saving__every": 2,
        "saving__keep_run": "true",
    }
    run(recipe, output, "--max-steps", 2, **settings)
    shutil.rmtree(output)
    run(recipe, output, "--resume", **settings)
    assert json.loads((output / "train.json").read_text())["resumed_from"] == 2
    assert losses(output) == pytest.approx(losses(alone), abs=1e-4)
