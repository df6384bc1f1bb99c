"""report.html of a training run: curves, memory and config. Self-contained: no network, no fonts, no script."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from optc.compiler.diagnostics import os_errors
from optc.compiler.version import version
from optc.training.metrics import StepRecord
from optc.training.result import TrainResult

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 720, 220, 64, 34
_COLORS = ("#2563eb", "#d97706", "#059669", "#be185d")
_MOST_POINTS, _MOST_DOTS = 600, 80
_CURVES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Loss, nats per label token", ("loss", "cross_entropy", "divergence", "validation_loss")),
    ("Perplexity of the validation set", ("validation_perplexity",)),
    ("Rewards: nats over the reference, times beta", ("chosen_reward", "rejected_reward")),
    ("Share of pairs whose chosen answer has the higher reward", ("reward_accuracy", "validation_accuracy")),
    ("Learning rate", ("lr",)),
    ("Norm of the gradient before clipping", ("grad_norm",)),
    ("Tokens per second", ("tokens_per_s",)),
    ("Model FLOP utilization", ("mfu",)),
    ("Loss scale", ("scale",)),
)


@dataclass(frozen=True)
class _Line:
    name: str
    color: str
    points: str
    dots: tuple[tuple[float, float, str], ...]


def write_train_report(directory: Path, result: TrainResult, records: Sequence[StepRecord]) -> None:
    """Write `report.html` into the folder of a trained model.

    Raises:
        ResourceError, InputError: the file cannot be written.
    """
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader(
            [
                jinja2.PackageLoader("optc.training", "templates"),
                jinja2.PackageLoader("optc.exporters.reports", "templates"),
            ]
        ),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    memory = records[-1].memory
    text = environment.get_template("train_report.html").render(
        r=result,
        title=f"{Path(result.output).name}: {result.steps} steps",
        version=version(),
        facts=_facts(result, records),
        plots=[plot for title, keys in _CURVES if (plot := curve(title, records, keys)) is not None],
        memory=[] if memory is None else [(name, getattr(memory, name)) for name in memory.__struct_fields__],
        events=[(row.step, row.skipped) for row in records if row.skipped is not None],
        config=list(_flat(result.config)),
    )
    with os_errors("writing the report", str(directory / "report.html")):
        (directory / "report.html").write_text(text)


def curve(title: str, records: Sequence[StepRecord], keys: Sequence[str]) -> dict[str, Any] | None:
    """Geometry of a plot of some fields by step, scales linear from the least value to the largest; None without values.

    A field that equals the first one everywhere is left out; of many steps, every n-th is drawn.
    """
    table = {key: [(row.step, getattr(row, key)) for row in records] for key in keys}
    kept = {key: _finite(rows) for key, rows in table.items()}
    kept = {key: rows for key, rows in kept.items() if rows and (key == keys[0] or rows != kept[keys[0]])}
    values = [value for rows in kept.values() for _, value in rows]
    if not values:
        return None
    low, high = min(values), max(values)
    spread = (high - low) or abs(high) or 1.0
    first, last = records[0].step, max(records[-1].step, records[0].step + 1)
    right, bottom = _WIDTH - 10, _HEIGHT - _BOTTOM

    def x(step: int) -> float:
        return round(_LEFT + (step - first) * (right - _LEFT) / (last - first), 1)

    def y(value: float) -> float:
        return round(10 + (low + spread - value) / spread * (bottom - 10), 1)

    lines = []
    for color, (key, rows) in zip(_COLORS, kept.items(), strict=False):
        name = key.replace("_", " ")
        shown = rows[:: max(1, math.ceil(len(rows) / _MOST_POINTS))]
        places = [(x(step), y(value), f"step {step}: {name} {value:.5g}") for step, value in shown]
        points = " ".join(f"{px},{py}" for px, py, _ in places)
        lines.append(_Line(name, color, points, tuple(places) if len(places) <= _MOST_DOTS else ()))
    marks = sorted({first + round(part * (last - first) / 6) for part in range(7)})
    return {
        "title": title,
        "width": _WIDTH,
        "height": _HEIGHT,
        "left": _LEFT,
        "right": right,
        "bottom": bottom,
        "series": lines,
        "levels": [(y(low + spread * part / 4), f"{low + spread * part / 4:.4g}") for part in range(5)],
        "steps": [(x(step), step) for step in marks],
    }


def _finite(rows: Sequence[tuple[int, float | None]]) -> list[tuple[int, float]]:
    return [(step, value) for step, value in rows if value is not None and math.isfinite(value)]


def _facts(result: TrainResult, records: Sequence[StepRecord]) -> list[tuple[str, str]]:
    def number(value: float | None) -> str:
        return "not finite" if value is None else f"{value:.4f}"

    facts = [
        (f"{number(result.first_loss)} → {number(result.last_loss)}", "loss, first step and last"),
        (f"{result.tokens:,}", "label tokens"),
        (f"{result.tokens / result.seconds:,.0f}", f"tokens per second, {result.seconds:.1f} s in all"),
        (f"{result.trainable / 1e6:.2f} M", f"trainable of {result.parameters / 1e6:.2f} M parameters"),
        (result.config["precision"], f"compute type, {result.config['optimizer']['name']}"),
    ]
    if (held_out := result.validation) is not None:
        losses = f"{number(held_out.first)} → {number(held_out.best)}"
        facts.append((losses, f"validation loss at the start and at its best, in step {held_out.best_step}"))
    if records[-1].memory is not None:
        facts.append((f"{records[-1].memory.peak / 1e6:,.0f} MB", "peak memory"))
    return facts


def _flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
