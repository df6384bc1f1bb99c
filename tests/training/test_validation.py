"""Validation sets: the loss that is measured, the best weights that are kept, an early end, and runs that resume all of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.nn import functional
from training_runs import VOCAB, interrupted, small_config, small_model, token_file

from optc.compiler.diagnostics import InputError, UsageError
from optc.training import checkpoint, saving
from optc.training.config import TrainConfig
from optc.training.corpus import Corpus, read_corpus
from optc.training.data import IGNORED, Reader
from optc.training.held_out import hold_out
from optc.training.loop import run_folder, train
from optc.training.metrics import StepRecord, read_log
from optc.training.models import load_frozen
from optc.training.recipe import load_config
from optc.training.setup import prepare
from optc.training.validation import measure
from optc.training.world import World

LENGTHS = (9, 21, 40)
OVERFITS: dict[str, Any] = {  # steps 2 and 4 are the best so far, those behind are not
    "optimizer": {"lr": 3e-2},
    "max_steps": 12,
    "schedule": {"kind": "constant"},
}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model with dropout, so that random numbers and the mode of the model matter, and a text."""
    folder = tmp_path_factory.mktemp("start")
    return small_model(folder / "model", dropout=0.3), token_file(folder / "text.jsonl")


@pytest.fixture(scope="module")
def apart(start: tuple[Path, Path]) -> Path:
    return token_file(start[0].parent / "apart.jsonl", lengths=LENGTHS, seed=1)


def by_hand(model: Path, text: Path) -> float:
    """Nats per label token of each document alone, by transformers; documents end with the model's end token."""
    network, total, count = load_frozen(model), 0.0, 0
    for line in text.read_text().splitlines():
        tokens = torch.tensor([[*json.loads(line)["tokens"], 1]])
        for piece in range(0, tokens.shape[1] - 1, 32):
            part = tokens[:, piece : piece + 33]
            found = network(input_ids=part[:, :-1]).logits[0]
            total += float(functional.cross_entropy(found, part[0, 1:], reduction="sum"))
            count += part.shape[1] - 1
    return total / count


@pytest.fixture(scope="module")
def whole(start: tuple[Path, Path], apart: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that overfits."""
    output = tmp_path_factory.mktemp("whole") / "out"
    train(small_config(*start, output, validation={"text": [str(apart)], "every": 2}, **OVERFITS))
    return output


def test_the_loss_is_that_of_each_document_alone(start: tuple[Path, Path], apart: Path, tmp_path: Path) -> None:
    run = prepare(small_config(*start, tmp_path / "out", validation={"text": [str(apart)]}), World())
    found = measure(run)
    assert found.tokens == sum(LENGTHS)
    assert found.losses.loss == pytest.approx(by_hand(start[0], apart), rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(found.losses.loss))
    assert run.model.training


def test_log_summary_and_report_tell_the_curve(whole: Path, start: tuple[Path, Path], apart: Path) -> None:
    rows = read_log(whole / "log.jsonl")
    curve = {row.step: row.validation_loss for row in rows if row.validation_loss is not None}
    assert list(curve) == [2, 4, 6, 8, 10, 12]
    assert all(
        row.validation_perplexity == pytest.approx(math.exp(curve[row.step])) for row in rows if row.step in curve
    )
    found = json.loads((whole / "train.json").read_text())["validation"]
    best = min(curve, key=lambda step: curve[step])
    assert found == {
        "first": pytest.approx(by_hand(start[0], apart), rel=1e-5),
        "first_perplexity": pytest.approx(math.exp(by_hand(start[0], apart)), rel=1e-4),
        "best": curve[best],
        "best_step": best,
        "last": curve[12],
        "written_step": best,
        "stopped_early": False,
    }
    report = (whole / "report.html").read_text()
    for text in ("validation loss", "Perplexity of the validation set", f"holds the weights of step {best}."):
        assert text in report


def test_the_folder_holds_the_best_weights(whole: Path, apart: Path) -> None:
    found = json.loads((whole / "train.json").read_text())["validation"]
    assert found["best_step"] < 12
    assert by_hand(whole, apart) == pytest.approx(found["best"], rel=1e-5)
    assert found["best"] < found["last"]


def test_measuring_changes_nothing(start: tuple[Path, Path], whole: Path, apart: Path, tmp_path: Path) -> None:
    train(small_config(*start, tmp_path / "plain", **OVERFITS))
    last = {"text": [str(apart)], "every": 5, "keep_best": False}
    train(small_config(*start, tmp_path / "last", validation=last, **OVERFITS))
    rows = [
        [row.loss for row in read_log(path / "log.jsonl")] for path in (tmp_path / "plain", tmp_path / "last", whole)
    ]
    assert rows[0] == rows[1] == rows[2]
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "last"))
    assert one == two


@pytest.mark.parametrize("step", [3, 9])
def test_resumed_equals_the_whole_run(
    start: tuple[Path, Path], whole: Path, apart: Path, tmp_path: Path, step: int
) -> None:
    """Also where the best step is older than the checkpoints that stay."""
    parts = {"text": [str(apart)], "every": 2}
    config = small_config(*start, tmp_path / "out", validation=parts, saving={"every": 1, "keep": 1}, **OVERFITS)
    interrupted(config, step)
    assert train(config, resume=True).resumed_from == step - 1
    kept = ("step", "loss", "validation_loss", "validation_perplexity")
    one, two = (
        [[getattr(row, key) for key in kept] for row in read_log(path / "log.jsonl")]
        for path in (whole, tmp_path / "out")
    )
    assert one == two
    results = [json.loads((path / "train.json").read_text())["validation"] for path in (whole, tmp_path / "out")]
    assert results[0] == results[1]
    assert (whole / "model.safetensors").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()


def test_the_run_ends_when_nothing_gets_better(
    start: tuple[Path, Path], whole: Path, apart: Path, tmp_path: Path
) -> None:
    best = json.loads((whole / "train.json").read_text())["validation"]["best_step"]
    early = {"text": [str(apart)], "every": 2, "patience": 2}
    config = small_config(
        *start, tmp_path / "out", validation=early, saving={"every": 50, "keep_run": True}, **OVERFITS
    )
    found = train(config)
    assert found is not None
    assert found.validation is not None
    assert found.steps == best + 4 < 12
    assert found.validation.stopped_early
    assert "The run ended early: its last 2 measurements" in (tmp_path / "out" / "report.html").read_text()
    places = [path.name for path in checkpoint.checkpoints(run_folder(tmp_path / "out"))]
    assert places == [f"step-{step:08d}" for step in (best, best + 4)]
    assert (whole / "model.safetensors").read_bytes() == (tmp_path / "out" / "model.safetensors").read_bytes()


def test_shards_keep_the_best_weights_too(start: tuple[Path, Path], whole: Path, apart: Path, tmp_path: Path) -> None:
    measured = {"text": [str(apart)], "every": 2}
    train(small_config(*start, tmp_path / "out", validation=measured, parallel={"kind": "fsdp"}, **OVERFITS))
    assert not dist.is_initialized()
    one, two = (load_file(path / "model.safetensors") for path in (whole, tmp_path / "out"))
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)


@pytest.mark.parametrize("batching", ["pack", "tokens"])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_share_the_set(start: tuple[Path, Path], tmp_path: Path, batching: str, ranks: int) -> None:
    config = small_config(*start, tmp_path / "out", batch_size=6, seq_len=16, data={"batching": batching})
    text = read_corpus(config.data.text, None, vocab_size=VOCAB, end_token=None)
    parts = [
        Reader(text.documents, config, world_size=ranks, rank=rank, held_out=True).whole_epoch()
        for rank in range(ranks)
    ]
    assert len({len(part) for part in parts}) == 1
    found = sorted(
        pair
        for part in parts
        for batch in part
        for pair in zip(
            batch.input_ids[batch.labels != IGNORED].tolist(),
            batch.labels[batch.labels != IGNORED].tolist(),
            strict=True,
        )
    )
    expected = sorted(
        pair for item in text.documents for pair in zip(item[:-1].tolist(), item[1:].tolist(), strict=True)
    )
    assert found == expected


class TestShare:
    def corpus(self, *lengths: int) -> Corpus:
        documents = [torch.arange(size) + 1000 * number for number, size in enumerate(lengths)]
        return Corpus(
            documents, [None if size % 2 else item % 2 == 0 for size, item in zip(lengths, documents, strict=True)]
        )

    def test_whole_documents_are_held_out(self) -> None:
        whole = self.corpus(*[20] * 50)
        kept, apart = hold_out(whole, 0.1, seq_len=32, seed=0)
        assert (len(kept.documents), len(apart.documents)) == (45, 5)
        assert sorted(map(int, torch.cat([*kept.documents, *apart.documents]))) == sorted(
            map(int, torch.cat(whole.documents))
        )
        other = hold_out(whole, 0.1, seq_len=32, seed=1)[1]
        assert {int(item[0]) for item in apart.documents} != {int(item[0]) for item in other.documents}

    def test_of_one_book_its_end(self) -> None:
        kept, apart = hold_out(self.corpus(1000), 0.1, seq_len=32, seed=0)
        assert [len(item) for item in (*kept.documents, *apart.documents)] == [904, 96]
        assert torch.equal(apart.documents[0], torch.arange(904, 1000))
        assert torch.equal(apart.learned[0], torch.arange(904, 1000) % 2 == 0)

    def test_one_is_held_out_at_least(self) -> None:
        kept, apart = hold_out(self.corpus(20, 20, 20), 0.01, seq_len=32, seed=0)
        assert (len(kept.documents), len(apart.documents)) == (2, 1)

    def test_too_little(self) -> None:
        with pytest.raises(InputError, match=r"a share of 0.1 cannot be held out of 1 document\(s\)"):
            hold_out(self.corpus(20), 0.1, seq_len=32, seed=0)

    def test_a_run(self, start: tuple[Path, Path], tmp_path: Path) -> None:
        found = train(small_config(*start, tmp_path / "out", max_steps=1, validation={"share": 0.2}))
        assert found is not None
        assert found.validation is not None
        assert found.validation.first is not None
        assert found.validation.first_perplexity == pytest.approx(math.exp(found.validation.first))


class TestRefused:
    @pytest.mark.parametrize(
        ("keys", "message"),
        [
            ({"text": ["a"], "share": 0.1}, "validation.text and validation.share are two validation sets"),
            ({"patience": 2}, "validation.patience has no effect without a validation set"),
        ],
    )
    def test_contradictions(self, tmp_path: Path, keys: dict[str, Any], message: str) -> None:
        with pytest.raises(UsageError, match=message):
            small_config(tmp_path, tmp_path, tmp_path, validation=keys)

    def test_a_missing_file(self, start: tuple[Path, Path], tmp_path: Path) -> None:
        with pytest.raises(InputError, match="the validation text does not exist"):
            train(small_config(*start, tmp_path / "out", validation={"text": [str(tmp_path / "none.txt")]}))

    def test_another_set_on_resume(self, start: tuple[Path, Path], apart: Path, tmp_path: Path) -> None:
        config = small_config(*start, tmp_path / "out", validation={"text": [str(apart)]})
        interrupted(config, 3)
        with pytest.raises(InputError, match="belongs to a run with another validation set") as found:
            train(small_config(*start, tmp_path / "out"), resume=True)
        assert str(found.value.why).endswith("and the run now has none")


class TestLength:
    def reader(self, start: tuple[Path, Path], tmp_path: Path, **more: Any) -> Reader:
        config = small_config(*start, tmp_path / "out", **more)
        return Reader(read_corpus(config.data.text, None, vocab_size=VOCAB, end_token=None).documents, config)

    @pytest.mark.parametrize("batching", ["pack", "tokens"])
    @pytest.mark.parametrize("epochs", [1.0, 2.0, 2.5])
    def test_steps_reach_the_end_of_the_epoch(
        self, start: tuple[Path, Path], tmp_path: Path, batching: str, epochs: float
    ) -> None:
        found = self.reader(start, tmp_path, batch_size=2, data={"batching": batching})
        steps = found.steps_of(epochs)
        for _ in range(steps - 1):
            found.next_step()
        assert found.position.epoch < epochs  # without the last step it is not complete
        found.next_step()
        place = found.position
        assert place.epoch + place.unit / len(found._plan(place.epoch)) >= epochs

    def test_epochs_take_the_place_of_max_steps(self, start: tuple[Path, Path], tmp_path: Path) -> None:
        config = small_config(*start, tmp_path / "out", epochs=2, max_steps=1, batch_size=8)
        expected = self.reader(start, tmp_path, batch_size=8).steps_of(2)
        seen: list[StepRecord] = []
        told: list[tuple[int, int]] = []
        result = train(config, on_step=seen.append, on_start=lambda *steps: told.append(steps))
        assert result is not None
        assert result.steps == len(seen) == result.config["max_steps"] == expected > 1
        assert told == [(0, expected)]
        assert seen[-1].lr == pytest.approx(0.1 * 1e-2)  # the schedule ends with the run


def test_a_checkpoint_is_written_when_the_newest_is_old(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(saving.time, "monotonic", lambda: now[0])
    run: Any = type("Run", (), {"world": World(), "device": torch.device("cpu")})
    clock = saving.SaveClock(5.0)
    assert not clock.due(run)
    now[0] = 300.0
    assert clock.due(run)
    with clock.saving():
        now[0] = 360.0  # it takes a minute: the next one waits for twenty
    now[0] = 360.0 + 1199
    assert not clock.due(run)
    now[0] += 1
    assert clock.due(run)
    assert not saving.SaveClock(0.0).due(run)


def test_old_checkpoints_are_due_in_a_run(
    start: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving.SaveClock, "due", lambda clock, run: run.step == 3)
    more = {"every": 50, "keep_run": True}
    train(small_config(*start, tmp_path / "out", max_steps=4, saving=more))
    places = [path.name for path in checkpoint.checkpoints(run_folder(tmp_path / "out"))]
    assert places == ["step-00000003", "step-00000004"]


def test_the_default_saves_every_few_minutes() -> None:
    config: TrainConfig = load_config("finetune")
    assert 0 < config.saving.minutes <= 5
