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
RESUMED = [kind for kind in KINDS if kind in ("fsdp", "deepspeed-3")]
OPTIMIZERS = {
    "lion": {"optimizer.name": "lion", "optimizer.lr": 1e-4},
    "sophia": {"optimizer.name": "sophia", "optimizer.lr": 1e-3, "optimizer.hessian_every": 3},
}
OTHERS = [("ddp", "lion"), ("fsdp", "lion"), ("ddp", "sophia")] if importlib.util.find_spec("pytorch_optimizer") else []


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
def preferences(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of answers, of which some are held out."""
    folder = tmp_path_factory.mktemp("preferences")
    words = ["sea", "sky", "sun", "sand", "salt", "sail", "storm", "shore"]
    rows = [{"prompt": f"the {one} and", "chosen": f" the {two}", "rejected": " of"} for one in words for two in words]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tree = json.loads(recipe.read_text()) | {
        "data": {"text": [str(folder / "pairs.jsonl")]},
        "dpo": {"enabled": True},
        "validation": {"share": 0.2, "every": 2},
    }
    (folder / "recipe.yaml").write_text(json.dumps(tree))
    return folder / "recipe.yaml"


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
def outputs(recipe: Path, preferences: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind's output on two ranks, one after another in processes that are forked, as starting them takes longer
    than the runs. Two runs end after two steps: `torchrun -m optc train` resumes one, and the forks the other, because
    a process that was not forked compiles DeepSpeed's all-reduce in shared memory, which takes longer than all tests
    of ranks."""
    place = tmp_path_factory.mktemp("ranks")
    runs = [[str(recipe), *flags(kind), "-o", str(place / kind)] for kind in KINDS]
    resumed = {kind: _saving(recipe, place, kind) for kind in RESUMED}
    runs += [[*run, "--max-steps", "2"] for run in resumed.values()]
    runs += [[*run, "--resume"] for kind, run in resumed.items() if kind != "fsdp"]
    runs += [[str(preferences), *flags(kind), "-o", str(place / f"preferences-{kind}")] for kind in ("ddp", "fsdp")]
    runs += [
        [str(recipe), *flags(kind), *optimizer(name), "-o", str(place / f"{kind}-{name}")] for kind, name in OTHERS
    ]
    ranks(2, Path(__file__).with_name("ranks_driver.py"), json.dumps(runs))
    shutil.rmtree(place / "resumed-fsdp")
    torchrun(2, "-m", "optc", "train", *resumed["fsdp"], "--resume")
    return place


def optimizer(name: str) -> list[str]:
    """The flags of an optimizer."""
    return [word for key, value in OPTIMIZERS[name].items() for word in ("--set", f"{key}={value}")]


def _saving(recipe: Path, place: Path, kind: str) -> list[str]:
    """Arguments of a run that keeps its checkpoint of every second step."""
    saving = ["--set", "saving.every=2", "--set", "saving.keep_run=true"]
    return [str(recipe), *flags(kind), *saving, "-o", str(place / f"resumed-{kind}")]


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


@pytest.mark.parametrize("kind", RESUMED)
def test_two_ranks_resume(outputs: Path, alone: Path, kind: str) -> None:
    """Two steps, then a run that goes on from their checkpoint."""
    output = outputs / f"resumed-{kind}"
    assert json.loads((output / "train.json").read_text())["resumed_from"] == 2
    assert losses(output) == pytest.approx(losses(alone), abs=1e-4)


@pytest.mark.parametrize(("kind", "name"), OTHERS)
def test_other_optimizers_on_two_ranks(outputs: Path, recipe: Path, tmp_path: Path, kind: str, name: str) -> None:
    """Lion gives the curve of one process. Sophia draws noise on each rank, so that its steps are others behind the
    first estimate, and the curve goes the same way."""
    values = {"output": str(tmp_path / "out"), **OPTIMIZERS[name]}
    train(load_config(str(recipe), values=values))
    found, expected = losses(outputs / f"{kind}-{name}"), losses(tmp_path / "out")
    assert len(found) == STEPS
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    assert found == pytest.approx(expected, abs={"lion": 1e-3, "sophia": 0.1}[name])
    assert abs(float(expected[-1] or 0) - float(expected[0] or 0)) > 0.02  # it does move


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_preferences_and_what_is_held_out_on_two_ranks(
    outputs: Path, preferences: Path, tmp_path: Path, kind: str
) -> None:
    """Losses, rewards and the measurements of the validation set are those of one process."""
    train(load_config(str(preferences), values={"output": str(tmp_path / "out")}))
    found, expected = (read_log(folder / "log.jsonl") for folder in (outputs / f"preferences-{kind}", tmp_path / "out"))
    names = ("loss", "chosen_reward", "rejected_reward", "reward_accuracy", "validation_loss", "validation_accuracy")
    assert len(found) == len(expected) == STEPS
    for one, other in zip(found, expected, strict=True):
        for name in names:
            assert getattr(one, name) == pytest.approx(getattr(other, name), abs=1e-5), name
    assert expected[1].validation_loss is not None
    assert expected[-1].loss != expected[0].loss
