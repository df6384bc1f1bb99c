"""The page of a training run: what its charts draw of given steps, and the sample before and after."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from html_pages import Page
from letter_texts import letters
from training_runs import interrupted, small_config, small_model, token_file
from transformers import AutoModelForCausalLM

from optc.training.config import TrainConfig
from optc.training.curves import PANELS, smoothed, training_chart, training_charts
from optc.training.loop import plain_config, train
from optc.training.metrics import Memory, StepRecord, read_log
from optc.training.result import TrainResult, ValidationResult
from optc.training.sample import NEW_TOKENS, PROMPT_TOKENS, TrainSample
from optc.training.train_report import write_train_report

LOSS, CROSS_ENTROPY, DIVERGENCE = PANELS[:3]
EVIL = '<script>alert("x")</script>"><img src=x onerror=alert(1)>'


def record(step: int, **more: Any) -> StepRecord:
    fields = {
        "loss": 1.0,
        "cross_entropy": 1.0,
        "lr": 0.1,
        "grad_norm": 1.0,
        "tokens": 8,
        "seconds": 1.0,
        "tokens_per_s": 8.0,
    }
    return StepRecord(step=step, epoch=0, **{**fields, **more})


def validation(**more: Any) -> ValidationResult:
    fields = {"first": 5.0, "best": 2.0, "best_step": 2, "last": 3.0, "written_step": 2, "stopped_early": False}
    return ValidationResult(**{**fields, **more})


def test_a_curve_spans_the_plot_and_is_broken_where_there_is_no_number() -> None:
    values = {1: 4.0, 2: 3.0, 3: None, 4: 2.0, 5: 2.0}
    chart = training_chart(LOSS, [record(step, loss=value) for step, value in values.items()])
    assert chart is not None
    assert chart.lines[0].path == "M0 0 L25 50 L75 100 L100 100"
    assert [(tick.text, tick.place) for tick in chart.y_ticks] == [
        ("2.0", 100),
        ("2.5", 75),
        ("3.0", 50),
        ("3.5", 25),
        ("4.0", 0),
    ]
    assert [tick.text for tick in chart.x_ticks] == ["1", "2", "3", "4", "5"]
    assert [dot.text for dot in chart.dots][:2] == ["step 1: loss 4.0000", "step 2: loss 3.0000"]


def test_the_validation_set_begins_before_the_first_step() -> None:
    rows = [record(1, loss=4.0), record(2, loss=3.0, validation_loss=2.0), record(4, loss=2.0, validation_loss=3.0)]
    chart = training_chart(LOSS, rows, validation())
    assert chart is not None
    assert [key.text for key in chart.keys] == ["loss", "validation loss"]
    assert chart.lines[1].path == "M0 0 L50 100 L100 66.667"
    assert [(mark.place, mark.text) for mark in chart.marks] == [(50, "best: step 2")]
    last = training_chart(LOSS, rows, validation(written_step=4))
    assert last is not None
    assert not last.marks


def test_perplexity_begins_there_too() -> None:
    rows = [record(1), record(2, validation_perplexity=20.0), record(4, validation_perplexity=10.0)]
    panel = next(panel for panel in PANELS if panel.fields == ("validation_perplexity",))
    chart = training_chart(panel, rows, validation(first_perplexity=30.0))
    assert chart is not None
    assert chart.lines[0].path == "M0 0 L50 50 L100 100"
    assert next(dot.text for dot in chart.dots) == "step 0: validation perplexity 30.000"
    without = training_chart(panel, rows, validation())
    assert without is not None
    assert without.lines[0].path == "M50 0 L100 100"


def test_losses_of_other_scales_have_charts_of_their_own() -> None:
    rows = [record(step, loss=0.5, cross_entropy=3.0, divergence=0.01 * step) for step in range(1, 5)]
    charts = {chart.title.partition(",")[0]: chart for chart in training_charts(rows)}
    assert list(charts)[:3] == ["Loss", "Cross-entropy with the text", "Divergence from the teacher"]
    assert [tick.text for tick in charts["Divergence from the teacher"].y_ticks] == ["0.01", "0.02", "0.03", "0.04"]
    assert training_chart(CROSS_ENTROPY, [record(step) for step in (1, 2)]) is None, "it is the loss itself"
    assert training_chart(DIVERGENCE, [record(step) for step in (1, 2)]) is None


def test_where_a_run_was_resumed_is_marked() -> None:
    rows = [record(step, resumed=step == 4) for step in range(1, 7)]
    charts = training_charts(rows)
    assert [(mark.place, mark.text) for mark in charts[0].marks] == [(60, "resumed from step 3")]
    assert {mark.place for chart in charts for mark in chart.marks} == {60}


def test_a_long_curve_is_smoothed() -> None:
    rows = [record(step, loss=2.0 + (step % 2)) for step in range(1, 101)]
    chart = training_chart(LOSS, rows)
    assert chart is not None
    assert [line.style for line in chart.lines] == ["s1 faint", "s1"]
    # Kept is 1 - 1/6: weights 1/6 and 5/36, normed by 11/36.
    found = smoothed([(step, 2.0 + (step % 2)) for step in range(1, 101)])
    assert found[0] == (1, pytest.approx(3.0))
    assert found[1][1] == pytest.approx((5 / 36 * 3 + 6 / 36 * 2) / (11 / 36))
    assert found[-1][1] == pytest.approx(2.5, abs=0.05)


def result(**more: Any) -> TrainResult:
    config = plain_config(TrainConfig(model="m", output="out/tuned"))
    rows = {"steps": 4, "tokens": 32, "seconds": 4.0, "parameters": 3_000_000, "trainable": 1000}
    plain = {
        "output": "out/tuned",
        "run": "r",
        "resumed_from": None,
        "first_loss": 4.0,
        "last_loss": None,
        "last": record(4),
    }
    return TrainResult(**{**plain, **rows, "config": config, **more})


def page(folder: Path, given: TrainResult, rows: list[StepRecord]) -> Page:
    write_train_report(folder, given, rows)
    found = Page((folder / "report.html").read_text())
    found.check_alone()
    assert found.scripts == []
    return found


def test_the_page(tmp_path: Path) -> None:
    memory = Memory(weights=12_600_000, gradients=12_600_000, optimizer=25_200_000, activations=0, peak=645_000_000)
    rows = [record(1), record(2, skipped="overflow", grad_norm=None), record(3, resumed=True), record(4, memory=memory)]
    sample = TrainSample(prompt="It was", before=" a dark day", after=" a dark night")
    found = page(tmp_path, result(validation=validation(), sample=sample, notes=("a note",)), rows)
    assert found.card("training loss")[0] == "4.000 → not finite"
    assert found.card("validation loss") == ("5.000 → 2.000", "at the start, and at its best in step 2")
    assert found.card("trainable parameters") == ("1,000", "of 3.00 M")
    for text in ("The folder holds the weights of step 2.", "The run was resumed from step 2.", "a note"):
        assert text in found.texts[""]
    assert ["2", "overflow"] in [row for table in found.tables for row in table]
    assert ["optimizer.lr", "0.0003"] in [row for table in found.tables for row in table]
    assert [given["title"] for given in found.of_class("s1") if "title" in given] == ["weights: 12.6 MB"]
    assert "It was\n a dark \nnight" in found.texts["sample"] or "night" in found.texts["sample"]
    plain = page(tmp_path, result(), [record(1), record(4)])
    assert not {"sample", "memory", "skipped"} & plain.texts.keys()


def test_nothing_of_a_file_is_markup(tmp_path: Path) -> None:
    config = plain_config(TrainConfig(model=EVIL, output=EVIL))
    config["data"]["text"] = [EVIL]
    sample = TrainSample(prompt=EVIL, before=EVIL, after=EVIL + "y")
    given = result(output=f"out/{EVIL}", run=EVIL, config=config, sample=sample, notes=(EVIL,))
    found = page(tmp_path, given, [record(1), record(2, skipped=EVIL)])
    assert "img" not in {tag for tag, _ in found.tags}
    assert EVIL in found.texts["config"]


@pytest.fixture(scope="module")
def lettered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model whose folder has a tokenizer, and text."""
    folder = tmp_path_factory.mktemp("lettered")
    model = small_model(folder / "model")
    letters()._core.save(str(model / "tokenizer.json"))
    return model, token_file(folder / "text.jsonl")


def greedy(folder: Path, text: Path) -> str:
    """transformers' own greedy continuation of the first document."""
    prompt = json.loads(text.read_text().splitlines()[0])["tokens"][:PROMPT_TOKENS]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        # The model has 64 positions, which end the continuation before NEW_TOKENS are written.
        ids = model.generate(torch.tensor([prompt]), do_sample=False, max_length=min(64, len(prompt) + NEW_TOKENS))
    return letters().decode([token for token in ids[0, len(prompt) :].tolist() if token != 1])


def test_the_sample_is_what_the_model_writes_before_and_after(lettered: tuple[Path, Path], tmp_path: Path) -> None:
    """Over a resume too: "before" is the model before the first step of all."""
    config = small_config(*lettered, tmp_path / "out", max_steps=8, saving={"every": 3})
    interrupted(config, 5)
    found = train(config, resume=True)
    assert found is not None
    assert found.sample is not None
    assert found.sample.before == greedy(lettered[0], lettered[1])
    assert found.sample.after == greedy(tmp_path / "out", lettered[1])
    assert found.sample.before != found.sample.after
    assert [row.step for row in read_log(tmp_path / "out" / "log.jsonl") if row.resumed] == [4]
    assert msgspec.json.decode((tmp_path / "out" / "train.json").read_bytes(), type=TrainResult) == found
    report = Page((tmp_path / "out" / "report.html").read_text())
    assert "resumed from step 3" in report.texts["curves"]
    assert "sample" in report.texts
