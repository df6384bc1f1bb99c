"""Shards: bytes per rank, and checkpoints that other numbers of ranks and other kinds of sharding read."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from optc.compiler.diagnostics import InputError
from optc.training.parallel import ParallelConfig, start_processes
from optc.training.sharded_checkpoint import load_sharded, save_sharded

sys.path.append(str(Path(__file__).parent))  # behind tests/, whose conftest others import
import shards_driver as driver
from training_runs import ranks

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
KINDS = ("fsdp", "zero1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints written by two processes, and what four made of them."""
    path = tmp_path_factory.mktemp("shards")
    ranks("2,4", Path(__file__).with_name("shards_driver.py"), path)
    return path


@pytest.fixture
def alone() -> Iterator[None]:
    start_processes(torch.device("cpu"), ParallelConfig())
    yield
    dist.destroy_process_group()


def report(folder: Path, ranks: int) -> Any:
    return json.loads((folder / f"{ranks}.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_saved_at_two_loaded_at_four(folder: Path, kind: str) -> None:
    found = report(folder, 4)[kind]
    assert found["equal"]
    assert found["extra"] == {"step": 3}
    assert found["losses"] == pytest.approx(report(folder, 2)[kind], abs=1e-6)  # optimizer state too


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_saved_at_two_loaded_at_one(folder: Path, kind: str) -> None:
    model, module, optimizer = driver.make("none", seed=9)
    assert load_sharded(folder / kind, model, optimizer) == {"step": 3}
    expected = load_file(folder / f"{kind}.safetensors")
    assert all(torch.equal(item, expected[name]) for name, item in driver.whole(model).items())
    losses = [driver.step(module, optimizer) for _ in range(3)]
    assert losses == pytest.approx(report(folder, 2)[kind], abs=1e-6)


@pytest.mark.slow
def test_bytes_per_rank(folder: Path) -> None:
    """Weights and AdamW's two moments are within 5 % of a quarter on each of four ranks."""
    found = report(folder, 4)["fsdp"]
    for weights, states in found["bytes"]:
        assert weights == pytest.approx(found["total"] / 4, rel=0.05)
        assert states == pytest.approx(2 * found["total"] / 4, rel=0.05)


@pytest.mark.slow
def test_gradients_cross_ranks_with_the_last_micro_batch_only(folder: Path) -> None:
    """Collectives in a micro-batch that is not the last, and in the last. Gloo scatters by an all-reduce."""
    expected = [[], ["gloo:all_reduce"]]
    assert report(folder, 2)["exchanges"] == {"fsdp": expected, "zero1": expected}


def test_a_checkpoint_is_whole_or_absent(tmp_path: Path, alone: None) -> None:
    model, module, optimizer = driver.make("none", seed=0)
    driver.step(module, optimizer)
    save_sharded(tmp_path / "saved", model, optimizer)
    assert [item.name for item in tmp_path.iterdir()] == ["saved"]
    with pytest.raises(InputError, match="exists"):
        save_sharded(tmp_path / "saved", model, optimizer)
    optimizer.state[model.head.weight]["exp_avg"] = torch.empty(2, device="meta")
    with pytest.raises(
        InputError,
        match=r"failed while writing the checkpoint\n(.*\n)*  cause: rank 0: Cannot copy out of meta",
    ):
        save_sharded(tmp_path / "broken", model, optimizer)
    assert [item.name for item in tmp_path.iterdir()] == ["saved"]


def test_what_cannot_be_loaded_is_named(tmp_path: Path, alone: None) -> None:
    model, module, optimizer = driver.make("none", seed=0)
    driver.step(module, optimizer)
    save_sharded(tmp_path / "saved", model, optimizer)
    other = driver.Tiny(width=24)
    with pytest.raises(
        InputError,
        match=r"another model\n.*\n  cause: embed.weight is \(64, 48\) in the checkpoint, \(64, 24\)",
    ):
        load_sharded(tmp_path / "saved", other, torch.optim.AdamW(other.parameters()))
    with pytest.raises(InputError, match="there is no such checkpoint"):
        load_sharded(tmp_path / "none", model, optimizer)
    (shard,) = (tmp_path / "saved").glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(InputError, match="the checkpoint is damaged"):
        load_sharded(tmp_path / "saved", model, optimizer)
