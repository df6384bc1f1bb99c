"""Training of Medusa heads on a frozen base: the loss by hand, runs, and their folder."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from training_runs import interrupted, packed, small_config, small_model, token_file

from optc.compiler.diagnostics import UsageError
from optc.compiler.model_folder.checkpoint import check_folder, config_digest, weights_digest
from optc.compiler.model_folder.medusa import WEIGHTS, MedusaFolder
from optc.training.config import TrainConfig
from optc.training.loop import train
from optc.training.medusa import MedusaTraining
from optc.training.metrics import read_log
from optc.training.models import load_trainable


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("start")
    return small_model(folder / "model"), token_file(folder / "text.jsonl")


def config_of(start: tuple[Path, Path], output: Path, **more: Any) -> TrainConfig:
    heads = {"enabled": True, "heads": 2, "layers": 2, "decay": 0.5, **more.pop("medusa", {})}
    return small_config(*start, output, medusa=heads, **more)


def training(start: tuple[Path, Path], **medusa: Any) -> MedusaTraining:
    config = config_of(start, Path("unused"), medusa=medusa)
    base = load_trainable(config)
    with torch.no_grad():
        base.get_input_embeddings().weight.mul_(40)  # so that it is sure of some tokens
    return MedusaTraining(base, config)


@pytest.mark.parametrize("own_linear", [False, True])
@pytest.mark.parametrize("targets", ["distribution", "text"])
def test_the_loss_is_that_of_each_place(start: tuple[Path, Path], own_linear: bool, targets: str) -> None:
    """Position by position, document by document: head k at i against what stands k + 1 behind it."""
    made, batch = training(start, own_linear=own_linear, targets=targets), packed()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.heads.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) * 0.3
    base = made.base
    parts = [(0, 0, 7), (0, 7, 5), (1, 0, 9)]
    total, first = 0.0, 0.0
    with torch.no_grad():
        for row, begin, size in parts:
            ids = batch.input_ids[row, begin : begin + size][None]
            hidden = base.model(ids).last_hidden_state[0]
            logits = base.lm_head(hidden)
            labels = batch.labels[row, begin : begin + size]
            for k, weight in ((1, 2 / 3), (2, 1 / 3)):
                x = hidden
                for block in made.heads[k - 1][:2]:
                    x = x + functional.silu(x @ block.linear.weight.T + block.linear.bias)
                guess = (x @ (made.heads[k - 1][2].weight if own_linear else base.lm_head.weight).T).log_softmax(-1)
                for place in range(size - k):
                    if targets == "text":
                        loss = -float(guess[place, labels[place + k]])
                    else:
                        loss = -float((logits[place + k].softmax(-1) * guess[place]).sum())
                    total += weight * loss
                    first += loss if k == 1 else 0.0
    found = made(batch)
    assert math.isclose(float(found.total.detach()), total, rel_tol=1e-4)
    assert math.isclose(float(found.cross_entropy), first, rel_tol=1e-4)
    found.total.backward()  # not into the base
    assert {name for name, item in made.named_parameters() if item.grad is not None} == {
        f"heads.{name}" for name, _ in made.heads.named_parameters()
    }


def test_heads_begin_as_the_bases_own(start: tuple[Path, Path]) -> None:
    made = training(start)
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(head(x), x) for head in made.heads)


def test_heads_learn_what_comes_later(start: tuple[Path, Path]) -> None:
    """The loss of one batch comes down by far, and the base stays."""
    made, batch = training(start), packed()
    before = {name: item.clone() for name, item in made.base.state_dict().items()}
    optimizer = torch.optim.AdamW(made.heads.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = made(batch).total
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] > losses[-1] * 1.5
    assert all(torch.equal(before[name], item) for name, item in made.base.state_dict().items())


def test_a_run_writes_a_folder_and_leaves_the_base(start: tuple[Path, Path], tmp_path: Path) -> None:
    """Killed and resumed, it is the same as in one go."""
    result = train(config_of(start, tmp_path / "whole", max_steps=12))
    assert result is not None
    assert result.trainable == 2 * 2 * (16 * 16 + 16)
    found, info = MedusaFolder.read(tmp_path / "whole"), check_folder(start[0])
    assert (found.config.medusa_num_heads, found.config.medusa_num_layers, found.hidden_size) == (2, 2, 16)
    assert found.vocab_size is None
    assert found.origin is not None
    assert (found.origin.config, found.origin.weights) == (config_digest(info), weights_digest(info))
    assert set(load_file(tmp_path / "whole" / WEIGHTS)) == {
        f"medusa_head.{k}.{j}.linear.{part}" for k in range(2) for j in range(2) for part in ("weight", "bias")
    }
    parts = config_of(start, tmp_path / "parts", max_steps=12)
    interrupted(parts, 7)
    train(parts, resume=True)
    whole, other = (load_file(tmp_path / name / WEIGHTS) for name in ("whole", "parts"))
    assert all(torch.equal(tensor, other[name]) for name, tensor in whole.items())
    losses = [[row.loss for row in read_log(tmp_path / name / "log.jsonl")] for name in ("whole", "parts")]
    assert losses[0] == losses[1]


def test_two_kinds_of_heads_are_trained_one_after_the_other(start: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"eagle3.enabled does not go with medusa.enabled"):
        train(config_of(start, tmp_path / "out", eagle3={"enabled": True}))
    with pytest.raises(UsageError, match=r"lora.enabled does not go with medusa.enabled"):
        train(config_of(start, tmp_path / "out", lora={"enabled": True}))
