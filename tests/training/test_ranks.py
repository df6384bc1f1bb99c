"""`torchrun -m optc train`: two ranks give the curve and the weights of one process, whatever is split between them."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EXAMPLE
from once import short_example
from safetensors.torch import load_file
from training_runs import ranks, torchrun

from optc.training.loop import train
from optc.training.metrics import read_log
from optc.training.recipe import load_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
]
STEPS = 4
KINDS = ["ddp", "fsdp", *(["deepspeed-2", "deepspeed-3"] if importlib.util.find_spec("deepspeed") else [])]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    tree: dict[str, Any] = {
        "model": str(short_example()),
        "data": {"text": [str(EXAMPLE.parent / "book.txt")]},
        "device": "cpu",
        "max_steps": STEPS,
        "batch_size": 4,
        "seq_len": 48,
        "loss_chunk": 32,
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


def flags(kind: str) -> list[str]:
    """Of a kind of parallelism; "deepspeed-3" is with the third stage."""
    kind, _, stage = kind.partition("-")
    settings = [f"parallel.kind={kind}", *([f"parallel.zero_stage={stage}"] if stage else [])]
    return [word for setting in settings for word in ("--set", setting)]


@pytest.fixture(scope="module")
def outputs(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind's output on two ranks, one after another in processes that are forked, as starting them takes longer
    than the runs. One run ends after two steps, and `torchrun -m optc train` resumes it."""
    place = tmp_path_factory.mktemp("ranks")
    runs = [[str(recipe), *flags(kind), "-o", str(place / kind)] for kind in KINDS]
    saving = ["--set", "saving.every=2", "--set", "saving.keep_run=true", "-o", str(place / "resumed")]
    runs.append([str(recipe), *flags(KINDS[-1]), *saving, "--max-steps", "2"])
    ranks(2, Path(__file__).with_name("ranks_driver.py"), json.dumps(runs))
    shutil.rmtree(place / "resumed")
    torchrun(2, "-m", "optc", "train", recipe, *flags(KINDS[-1]), *saving, "--resume")
    return place


def losses(folder: Path) -> list[float | None]:
    return [row.loss for row in read_log(folder / "log.jsonl")]


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_give_the_curve_and_the_weights_of_one_process(outputs: Path, alone: Path, kind: str) -> None:
    output = outputs / kind
    assert len(losses(output)) == STEPS
    assert losses(output) == pytest.approx(losses(alone), abs=1e-5)
    found, expected = (load_file(folder / "model.safetensors") for folder in (output, alone))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape, name
        # AdamW moves a weight by up to 3e-4 a step, whichever way noise points.
        assert float((found[name] - tensor).abs().mean()) < 1e-5, name


def test_two_ranks_resume(outputs: Path, alone: Path) -> None:
    """Two steps, then processes that go on from their checkpoint."""
    output = outputs / "resumed"
    assert json.loads((output / "train.json").read_text())["resumed_from"] == 2
    assert losses(output) == pytest.approx(losses(alone), abs=1e-4)
