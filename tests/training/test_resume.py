"""Checkpoints: killed runs go on to the same numbers; damaged and foreign ones are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from training_runs import interrupted, small_config, small_model, token_file

from optc.compiler.diagnostics import InputError
from optc.compiler.files import write_sums
from optc.training import checkpoint
from optc.training.config import TrainConfig
from optc.training.loop import run_folder, train
from optc.training.metrics import read_log

TESTS = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model with dropout, so that random numbers matter, and a text."""
    folder = tmp_path_factory.mktemp("start")
    return small_model(folder / "model", dropout=0.3), token_file(folder / "text.jsonl")


def losses(folder: Path) -> list[float | None]:
    return [row.loss for row in read_log(folder / "log.jsonl")]


@pytest.mark.slow
def test_killed_at_random_times_and_resumed_equals_the_whole_run(start: tuple[Path, Path], tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(TESTS / "training_kill_driver.py"),
        *map(str, start),
        str(tmp_path / "killed"),
        "5",
        "3",
    ]
    environment = {**os.environ, "PYTHONPATH": f"{TESTS.parent / 'src'}:{TESTS}", "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1800, check=True)
    report = json.loads(found.stdout.splitlines()[-1])
    assert report["status"] == 0
    assert len(report["killed_at"]) == 3
    result = json.loads((tmp_path / "killed" / "train.json").read_text())
    assert result["resumed_from"] >= 3
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert losses(whole) == losses(killed)
    assert len(losses(whole)) == 30
    held_out = [[row.validation_loss for row in read_log(path / "log.jsonl")] for path in (whole, killed)]
    assert held_out[0] == held_out[1]
    assert (whole / "model.safetensors").read_bytes() == (killed / "model.safetensors").read_bytes()
    assert not run_folder(killed).exists()


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "sophia"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_resumed_equals_the_whole_run(start: tuple[Path, Path], tmp_path: Path, optimizer: str, precision: str) -> None:
    if optimizer == "sophia" and precision == "fp16":
        pytest.skip("refused: see test_setup")
    more: dict[str, Any] = {
        "optimizer": {"name": optimizer, "lr": 1e-3, "hessian_every": 3},
        "precision": precision,
        "max_steps": 8,
        "saving": {"every": 2},
        "scaler": {"initial": 2.0**20, "growth_interval": 2},
    }
    train(small_config(*start, tmp_path / "whole", **more))
    config = small_config(*start, tmp_path / "parts", **more)
    interrupted(config, 5)
    assert [path.name for path in checkpoint.checkpoints(run_folder(tmp_path / "parts"))] == [
        "step-00000002",
        "step-00000004",
    ]
    result = train(config, resume=True)
    assert result.resumed_from == 4
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize(
    "more",
    [
        {"lora": {"enabled": True, "rank": 4, "dropout": 0.1}},
        {"lora": {"enabled": True, "rank": 4, "base": "nf4", "group_size": 16}},
        {"lora": {"enabled": True, "rank": 4, "dora": True, "modules_to_save": ["lm_head"]}},
        {"qat": {"enabled": True, "group_size": 16}, "distill": {"teacher": "self", "weight": 0.9}},
        {"qat": {"enabled": True, "group_size": 16, "kv_cache": "int8"}},
        {"checkpointing": {"policy": "full"}, "data": {"batching": "tokens"}},
    ],
    ids=["lora", "qlora", "dora", "qat", "qat-kv", "checkpointing"],
)
def test_what_is_applied_to_a_model_resumes_too(start: tuple[Path, Path], tmp_path: Path, more: dict[str, Any]) -> None:
    config = small_config(*start, tmp_path / "parts", **more)
    whole = train(small_config(*start, tmp_path / "whole", **more))
    interrupted(config, 5)
    parts = train(config, resume=True)
    assert whole is not None
    assert parts is not None
    assert parts.resumed_from == 4
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert one == two


@pytest.mark.parametrize("kind", ["ddp", "zero1", "fsdp"])
def test_sharded_checkpoints_resume(start: tuple[Path, Path], tmp_path: Path, kind: str) -> None:
    """A group of one rank; test_sharded_checkpoint has several."""
    more = {"parallel": {"kind": kind}}
    train(small_config(*start, tmp_path / "whole"))
    config = small_config(*start, tmp_path / "parts", **more)
    interrupted(config, 5)
    dist.destroy_process_group()
    with pytest.raises(InputError, match="the checkpoint was written by several processes"):
        train(small_config(*start, tmp_path / "parts"), resume=True)
    parts = train(config, resume=True)
    assert not dist.is_initialized()
    assert parts is not None
    assert parts.resumed_from == 4
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), abs=1e-6)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts"))
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)


def test_resume_without_a_checkpoint_starts(start: tuple[Path, Path], tmp_path: Path) -> None:
    config = small_config(*start, tmp_path / "out", max_steps=2)
    assert train(config, resume=True).resumed_from is None


def test_a_run_killed_after_publishing_is_done(start: tuple[Path, Path], tmp_path: Path) -> None:
    config = small_config(*start, tmp_path / "out", max_steps=2, saving={"every": 1, "keep_run": True})
    first = train(config)
    assert run_folder(tmp_path / "out").is_dir()
    assert train(config, resume=True) == first
    assert not run_folder(tmp_path / "out").exists()
    half_removed = tmp_path / ".out.run.gone-9999999-0123abcd"  # of a process that was killed while it removed it
    half_removed.mkdir()
    assert train(config, resume=True) == first
    assert not half_removed.exists()


def test_only_the_newest_checkpoints_stay(start: tuple[Path, Path], tmp_path: Path) -> None:
    config = small_config(*start, tmp_path / "out", max_steps=5, saving={"every": 1, "keep": 2, "keep_run": True})
    train(config)
    found = checkpoint.checkpoints(run_folder(tmp_path / "out"))
    assert [path.name for path in found] == ["step-00000004", "step-00000005"]
    assert sorted(item.name for item in found[-1].iterdir()) == [
        "SHA256SUMS",
        "checkpoint.json",
        "model.safetensors",
        "optimizer.safetensors",
    ]


class TestRefused:
    @pytest.fixture
    def stopped(self, start: tuple[Path, Path], tmp_path: Path) -> TrainConfig:
        config = small_config(*start, tmp_path / "out")
        interrupted(config, 3)
        return config

    def test_another_model(self, stopped: TrainConfig, start: tuple[Path, Path], tmp_path: Path) -> None:
        other = small_model(tmp_path / "other", seed=1, dropout=0.3)
        with pytest.raises(InputError, match="the checkpoint belongs to another model") as found:
            train(small_config(other, start[1], tmp_path / "out"), resume=True)
        assert "step-00000002" in str(found.value)
        assert found.value.exit_code == 3

    def test_another_text(self, stopped: TrainConfig, start: tuple[Path, Path], tmp_path: Path) -> None:
        text = token_file(tmp_path / "other.jsonl", seed=1)
        with pytest.raises(InputError, match="the checkpoint was trained on another text"):
            train(small_config(start[0], text, tmp_path / "out"), resume=True)

    def test_another_config(self, stopped: TrainConfig, start: tuple[Path, Path], tmp_path: Path) -> None:
        with pytest.raises(InputError, match="the checkpoint was made with another config") as found:
            train(small_config(*start, tmp_path / "out", optimizer={"lr": 1e-3}), resume=True)
        assert found.value.why == "optimizer.lr was 0.01, is 0.001"

    def test_an_unfinished_run_without_resume(self, stopped: TrainConfig) -> None:
        with pytest.raises(InputError, match="an unfinished run of this output exists") as found:
            train(stopped)
        assert "--resume" in str(found.value.remedy)

    @pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "checkpoint.json"])
    def test_damage(self, stopped: TrainConfig, tmp_path: Path, name: str) -> None:
        path = checkpoint.checkpoints(run_folder(tmp_path / "out"))[-1] / name
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(InputError, match="the checkpoint is damaged") as found:
            train(stopped, resume=True)
        assert name in str(found.value)

    def test_a_config_without_end(self, stopped: TrainConfig, tmp_path: Path) -> None:
        path = checkpoint.checkpoints(run_folder(tmp_path / "out"))[-1] / "checkpoint.json"
        nested = '{"a":' * 900 + "1" + "}" * 900
        path.write_text(path.read_text().replace('"config": {', f'"config": {{"a": {nested}, '))
        write_sums(path.parent)
        with pytest.raises(InputError, match="the checkpoint is damaged"):
            train(stopped, resume=True)

    def test_tensors_of_another_shape(self, stopped: TrainConfig, tmp_path: Path) -> None:
        path = checkpoint.checkpoints(run_folder(tmp_path / "out"))[-1] / "model.safetensors"
        tensors = load_file(path)
        save_file({**tensors, "model.norm.weight": torch.ones(3)}, path)
        write_sums(path.parent)
        with pytest.raises(InputError, match="belongs to another model") as found:
            train(stopped, resume=True)
        assert found.value.why == "model.norm.weight is (3,) in the checkpoint, (16,) in the model"

    def test_another_format(self, stopped: TrainConfig, tmp_path: Path) -> None:
        path = checkpoint.checkpoints(run_folder(tmp_path / "out"))[-1] / "checkpoint.json"
        path.write_text(path.read_text().replace('"format": 2', '"format": 3'))
        write_sums(path.parent)
        with pytest.raises(InputError, match="the checkpoint has format 3, this optc reads 2"):
            train(stopped, resume=True)
