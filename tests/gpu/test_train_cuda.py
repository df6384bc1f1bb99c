"""Training on a GPU gives the curves of the CPU, and goes on from checkpoints there."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from training_runs import interrupted, small_config, small_model, token_file, torchrun

from optc.training.checkpoint import checkpoints
from optc.training.loop import run_folder, train
from optc.training.metrics import read_log
from optc.training.setup import prepare
from optc.training.step import train_step
from optc.training.world import World

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
CASES: dict[str, dict[str, Any]] = {
    "adamw": {},
    "lion": {"optimizer": {"name": "lion", "lr": 1e-3}},
    "sophia": {"optimizer": {"name": "sophia", "lr": 1e-3, "hessian_every": 3}},
    "accumulation": {"gradient_accumulation": 2},
    "token budget": {"data": {"batching": "tokens"}},
    "checkpointing": {"checkpointing": {"policy": "selective"}},
    "qlora": {"lora": {"enabled": True, "rank": 4, "base": "nf4", "group_size": 16}},
    "qat": {"qat": {"enabled": True, "group_size": 16}, "distill": {"teacher": "self", "weight": 0.9}},
    "qat-kv": {"qat": {"enabled": True, "group_size": 16, "kv_cache": "int8"}},
    "ddp": {"parallel": {"kind": "ddp"}},
    "fsdp": {"parallel": {"kind": "fsdp"}},
    "zero1": {"parallel": {"kind": "zero1"}},
}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("start")
    return small_model(folder / "model"), token_file(folder / "text.jsonl")


def curve(start: tuple[Path, Path], device: str, **more: Any) -> list[float | None]:
    run = prepare(small_config(*start, Path("unused"), device=device, **more), World())
    try:
        return [train_step(run, last_good=None).loss for _ in range(6)]
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@pytest.mark.parametrize("case", CASES)
def test_the_curve_is_that_of_the_cpu(start: tuple[Path, Path], case: str) -> None:
    more = CASES[case]
    if case in ("lion", "sophia"):
        pytest.importorskip("pytorch_optimizer", reason="needs the extra `train`")
    # Sophia draws its noise on the device; a rounded number may move by a step: both curves go down alike.
    tolerance = {"sophia": 0.1, "qat": 5e-3, "qat-kv": 5e-3}.get(case, 2e-4)
    assert curve(start, "cuda", **more) == pytest.approx(curve(start, "cpu", **more), abs=tolerance)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_stays_near_fp32(start: tuple[Path, Path], precision: str) -> None:
    found = curve(start, "cuda", precision=precision, scaler={"initial": 1024.0})
    assert found == pytest.approx(curve(start, "cuda"), rel=torch.finfo(DTYPES[precision]).eps / 8)


def test_compiled_blocks_give_the_eager_curve(start: tuple[Path, Path]) -> None:
    found = curve(start, "cuda", compile={"scope": "blocks"}, loss_chunk=24)
    assert found == pytest.approx(curve(start, "cuda", loss_chunk=0), abs=2e-4)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_resumed_goes_on_to_the_same_curve(start: tuple[Path, Path], tmp_path: Path, precision: str) -> None:
    more: dict[str, Any] = {
        "device": "cuda",
        "precision": precision,
        "scaler": {"initial": 1024.0},
        "max_steps": 8,
    }
    train(small_config(*start, tmp_path / "whole", **more))
    config = small_config(*start, tmp_path / "parts", **more)
    interrupted(config, 5)
    assert len(checkpoints(run_folder(tmp_path / "parts"))) == 2
    result = train(config, resume=True)
    assert result is not None
    assert result.resumed_from == 4
    whole, parts = ([row.loss for row in read_log(tmp_path / name / "log.jsonl")] for name in ("whole", "parts"))
    assert parts == pytest.approx(whole, abs=1e-4)


def test_memory_is_split(start: tuple[Path, Path]) -> None:
    run = prepare(small_config(*start, Path("unused"), device="cuda"), World())
    found = train_step(run, last_good=None, with_memory=True).memory
    assert found is not None
    assert found.activations > 0
    assert found.peak >= found.weights + found.gradients + found.optimizer


@pytest.fixture(scope="module")
def alone(start: tuple[Path, Path]) -> list[float | None]:
    return curve(start, "cuda")


KINDS = ["ddp", "fsdp", "zero1", *(["deepspeed-2", "deepspeed-3"] if importlib.util.find_spec("deepspeed") else [])]
RESUMED = [kind for kind in KINDS if kind in ("ddp", "fsdp", "deepspeed-3")]
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "lion": {"name": "lion", "lr": 1e-3},
    "sophia": {"name": "sophia", "lr": 1e-3, "hessian_every": 3},
}
OTHERS = [("ddp", "lion"), ("fsdp", "lion"), ("ddp", "sophia")] if importlib.util.find_spec("pytorch_optimizer") else []
CONSTANT = ["--set", "schedule.kind=constant"]  # of a shorter run, too


def recipe(start: tuple[Path, Path], folder: Path) -> Path:
    """What `curve` runs, for the command."""
    path = folder / "recipe.yaml"
    path.write_text(
        f"model: {start[0]}\ndata: {{text: [{start[1]}]}}\nmax_steps: 6\nbatch_size: 4\nseq_len: 32\ndevice: cuda\n"
        "optimizer: {lr: 0.01}\nsaving: {every: 4}\n"
    )
    return path


def parallel(kind: str) -> list[str]:
    """The flags of a kind of parallelism; "deepspeed-3" is with the third stage."""
    kind, _, stage = kind.partition("-")
    settings = [f"parallel.kind={kind}", *([f"parallel.zero_stage={stage}"] if stage else [])]
    return [word for setting in settings for word in ("--set", setting)]


def outputs(ranks: int, start: tuple[Path, Path], place: Path, more: list[list[str]]) -> Path:
    """The folder of each kind's output, and of `more` runs: one after another in one group, as starting processes and
    connecting GPUs takes longer than the runs."""
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    whole = recipe(start, place)
    runs = [[str(whole), *parallel(kind), "-o", str(place / kind)] for kind in KINDS]
    runs += [[str(whole), *run] for run in more]
    torchrun(ranks, Path(__file__).parents[1] / "training" / "ranks_driver.py", json.dumps(runs), "cuda")
    return place


@pytest.fixture(scope="module")
def two(start: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    place, more = tmp_path_factory.mktemp("two"), []
    for kind in RESUMED:
        saving = ["--set", "saving.every=3", "--set", "saving.keep_run=true", "-o", str(place / f"resumed-{kind}")]
        run = [*parallel(kind), *CONSTANT, *saving]
        more += [[*run, "--max-steps", "3"], [*run, "--resume"]]
    for kind, name in OTHERS:
        flags = [word for key, value in OPTIMIZERS[name].items() for word in ("--set", f"optimizer.{key}={value}")]
        more.append([*parallel(kind), *flags, "-o", str(place / f"{kind}-{name}")])
    return outputs(2, start, place, more)


@pytest.fixture(scope="module")
def four(start: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return outputs(4, start, tmp_path_factory.mktemp("four"), [])


def losses(folder: Path) -> list[float | None]:
    return [row.loss for row in read_log(folder / "log.jsonl")]


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_give_the_curve_of_one_process(two: Path, alone: list[float | None], kind: str) -> None:
    assert losses(two / kind) == pytest.approx(alone, abs=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_four_ranks_give_the_curve_of_one_process(four: Path, alone: list[float | None], kind: str) -> None:
    assert losses(four / kind) == pytest.approx(alone, abs=2e-4)


@pytest.mark.parametrize("kind", RESUMED)
def test_two_ranks_resume(start: tuple[Path, Path], two: Path, kind: str) -> None:
    """Three steps, then a run that goes on from their checkpoint."""
    output = two / f"resumed-{kind}"
    assert json.loads((output / "train.json").read_text())["resumed_from"] == 3
    whole = curve(start, "cuda", schedule={"kind": "constant"})
    assert losses(output) == pytest.approx(whole, abs=2e-4)


@pytest.mark.parametrize(("kind", "name"), OTHERS)
def test_other_optimizers_on_two_ranks(start: tuple[Path, Path], two: Path, kind: str, name: str) -> None:
    """Sophia draws its noise on each rank: its curve goes the way of one process, not through the same points."""
    tolerance = {"lion": 2e-4, "sophia": 0.1}[name]
    expected = curve(start, "cuda", optimizer=OPTIMIZERS[name])
    assert losses(two / f"{kind}-{name}") == pytest.approx(expected, abs=tolerance)
