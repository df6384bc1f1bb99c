"""The loss made in the head is that of whole logits, in a step, on ranks, and where the head cannot make it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import bounds
import pytest
import torch
from torch import nn
from training_runs import small_config, small_model, token_file

from optc.compiler.diagnostics import GateError
from optc.training.chunked_head import check_head, chunked_head, loss_of
from optc.training.config import TrainConfig
from optc.training.distill import logits_of, loss_sums
from optc.training.saved_tensors import LiveTensors
from optc.training.setup import prepare
from optc.training.step import train_step
from optc.training.world import World


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("start")
    return small_model(folder / "model"), token_file(folder / "text.jsonl")


def make(start: tuple[Path, Path], **more: Any) -> TrainConfig:
    return small_config(*start, Path("unused"), **more)


@pytest.mark.parametrize("batching", ["pack", "tokens"])
def test_loss_and_gradients_are_those_of_whole_logits(start: tuple[Path, Path], batching: str) -> None:
    config = make(start, data={"batching": batching}, loss_chunk=24)
    run = prepare(config, World())
    assert run.head is run.model.lm_head
    batch = run.reader.next_step()[0]
    expected = loss_sums(logits_of(run.model, batch), batch, config, None)
    expected.total.backward()
    wanted = [item.grad for item in run.model.parameters()]
    run.model.zero_grad()
    found = loss_of(run.module, batch, config, head=run.head, teacher=None)
    found.total.backward()
    torch.testing.assert_close(found.total, expected.total)
    torch.testing.assert_close([item.grad for item in run.model.parameters()], wanted, atol=1e-4, rtol=1e-5)
    assert "forward" not in vars(run.head)  # the head is as it was


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"precision": "bf16"},
        {"precision": "fp16", "scaler": {"initial": 1024.0}},
        {"lora": {"enabled": True, "rank": 2}},
        {"gradient_accumulation": 2},
        {"distill": {"teacher": "self", "temperature": 2.0}, "data": {"batching": "tokens"}},
    ],
)
def test_a_run_has_the_curve_of_whole_logits(start: tuple[Path, Path], more: dict[str, Any]) -> None:
    chunked, whole = (_curve(start, loss_chunk=chunk, **more) for chunk in (24, 0))
    tolerance = 1e-5
    if "precision" in more:  # what it moves losses by in whole logits
        wide = _curve(start, loss_chunk=0, **{**more, "precision": "fp32"})
        tolerance = bounds.MARGIN * max(abs(a - b) for a, b in zip(whole, wide, strict=True))
        assert tolerance < 0.01
    assert chunked == pytest.approx(whole, abs=tolerance)


def _curve(start: tuple[Path, Path], **more: Any) -> list[float]:
    """Losses of six steps."""
    run = prepare(make(start, **more), World())
    assert (run.head is None) == (more["loss_chunk"] == 0)
    return [train_step(run, last_good=None).loss or math.nan for _ in range(6)]


def test_no_whole_logits_are_made(start: tuple[Path, Path]) -> None:
    peaks = []
    for chunk in (16, 0):
        run = prepare(make(start, loss_chunk=chunk, batch_size=32), World())
        batch = run.reader.next_step()[0]
        with LiveTensors() as live:
            loss_of(run.module, batch, run.config, head=run.head, teacher=None)
        peaks.append(live.peak)
    logits = 32 * 32 * run.model.config.vocab_size * 4
    assert peaks[1] - peaks[0] > logits  # the logits and what cross-entropy makes of them


def test_few_tokens_take_whole_logits(start: tuple[Path, Path]) -> None:
    run = prepare(make(start, batch_size=1, data={"batching": "tokens"}), World())
    batch = next(item for item in iter(lambda: run.reader.next_step()[0], None) if item.labels.numel() < 16)
    found = loss_of(run.module, batch, run.config, head=run.head, teacher=None).total
    assert torch.equal(found, loss_sums(logits_of(run.model, batch), batch, run.config, None).total)


@pytest.mark.parametrize(
    "more",
    [
        {"loss_chunk": 0},
        {"compile": {"scope": "model"}},
        {"parallel": {"kind": "deepspeed"}},
    ],
)
def test_what_needs_whole_logits_gets_them(start: tuple[Path, Path], more: dict[str, Any]) -> None:
    model = prepare(make(start), World()).model
    assert chunked_head(model, make(start)) is model.lm_head
    assert chunked_head(model, make(start, **more)) is None


def test_softcapped_logits_are_made_whole(start: tuple[Path, Path]) -> None:
    """The model's, or its teacher's."""
    model, teacher = (prepare(make(start), World()).model for _ in range(2))
    teacher.config.final_logit_softcapping = 30.0
    assert chunked_head(model, make(start), teacher) is None
    model.config.final_logit_softcapping = 30.0
    assert chunked_head(model, make(start)) is None


def test_a_model_that_changes_its_logits_is_refused(start: tuple[Path, Path]) -> None:
    model = prepare(make(start), World()).model
    config = make(start)

    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, **inputs: Any) -> Any:
            found = self.inner(**inputs)
            found.logits = found.logits * 2
            return found

    with pytest.raises(GateError, match="the loss made in the head is") as error:
        check_head(Doubled(), model.lm_head, config)
    assert error.value.where == "Doubled"
    assert error.value.remedy == "train on whole logits: --set loss_chunk=0"
