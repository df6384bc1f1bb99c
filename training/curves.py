"""The charts of a training run: one for each unit, so that no loss is flattened by another of a different scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from optc.exporters.reports.charts import Chart, Dot, Key, Line, Mark, color, downward, path
from optc.exporters.reports.numbers import number
from optc.exporters.reports.scales import Scale, Tick, linear_scale, log_scale
from optc.training.metrics import StepRecord
from optc.training.result import ValidationResult

MOST_POINTS, MOST_DOTS = 600, 40
SMOOTHED_FROM = 40
"""Steps from which on a noisy curve is drawn smoothed as well."""
_SPAN = 0.06
"""Share of the steps that the smoothing forgets over."""

Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Panel:
    """A chart of fields of `StepRecord` that have one unit and one scale.

    Attributes:
        noisy: the fields that every step has and that jump from one to the next.
        log: on a logarithmic axis.
    """

    title: str
    fields: tuple[str, ...]
    noisy: tuple[str, ...] = ()
    log: bool = False
    wide: bool = False


PANELS = (
    Panel("Loss, nats per label token", ("loss", "validation_loss"), noisy=("loss",), wide=True),
    Panel("Cross-entropy with the text, nats per label token", ("cross_entropy",), noisy=("cross_entropy",)),
    Panel("Divergence from the teacher, nats per label token", ("divergence",), noisy=("divergence",)),
    Panel("Perplexity of the validation set", ("validation_perplexity",)),
    Panel(
        "Rewards: nats over the reference, times beta",
        ("chosen_reward", "rejected_reward"),
        noisy=("chosen_reward", "rejected_reward"),
    ),
    Panel(
        "Share of pairs whose chosen answer has the higher reward",
        ("reward_accuracy", "validation_accuracy"),
        noisy=("reward_accuracy",),
    ),
    Panel("Learning rate", ("lr",)),
    Panel("Norm of the gradient before clipping", ("grad_norm",), noisy=("grad_norm",), log=True),
    Panel("Tokens per second", ("tokens_per_s",), noisy=("tokens_per_s",)),
    Panel("Model FLOP utilization", ("mfu",), noisy=("mfu",)),
    Panel("Loss scale", ("scale",), log=True),
)


def training_charts(records: Sequence[StepRecord], validation: ValidationResult | None = None) -> list[Chart]:
    """A chart for each panel that has values.

    Args:
        validation: adds what the validation set said before the first step, and the step that was written.
    """
    charts = (training_chart(panel, records, validation) for panel in PANELS)
    return [chart for chart in charts if chart is not None]


def training_chart(
    panel: Panel, records: Sequence[StepRecord], validation: ValidationResult | None = None
) -> Chart | None:
    """The fields of a panel by step; None without values. Of a field of many steps every n-th is drawn.

    A field that is the loss itself in every step is not drawn a second time. Where a run was resumed, and which step's
    weights were written, is marked.
    """
    table = {name: _finite(records, name) for name in panel.fields}
    start = None if validation is None else validation.first
    for name, before in _before(validation).items():
        if before is not None and name in table:
            table[name].insert(0, (0, before))
    table = {name: points for name, points in table.items() if points}
    if panel.fields[0] == "cross_entropy" and table.get("cross_entropy") == _finite(records, "loss"):
        return None
    if not table:
        return None
    values = [value for points in table.values() for _, value in points]
    log = panel.log and min(values) > 0 and max(values) > 8 * min(values)
    y = log_scale(values, most=4) if log else linear_scale(values, most=4)
    first = records[0].step if start is None else 0
    last = max(records[-1].step, first + 1)
    x = Scale(first, last, ())
    lines, dots, keys = [], [], []
    for index, (name, points) in enumerate(table.items()):
        style, smooth = color(index), name in panel.noisy and len(points) >= SMOOTHED_FROM
        shown = _thinned(points)
        lines.append(Line(f"{style} faint" if smooth else style, path([(float(s), v) for s, v in shown], x, y)))
        if smooth:
            lines.append(Line(style, path([(float(s), v) for s, v in _thinned(smoothed(points))], x, y)))
        if not smooth and len(shown) <= MOST_DOTS:
            dots += [
                Dot(style, x.place(step), 100 - y.place(value), f"step {step}: {_words(name)} {number(value, 5)}")
                for step, value in shown
            ]
        keys.append(Key(style, _words(name) + (", smoothed" if smooth else "")))
    return Chart(
        title=panel.title + (" (logarithmic scale)" if log else ""),
        y_ticks=downward(y.ticks),
        x_ticks=[Tick(x.place(step), f"{step:,}") for step in _round_steps(first, last, 8 if panel.wide else 5)],
        x_title="step",
        lines=lines,
        dots=dots,
        marks=_marks(panel, records, x, None if validation is None else validation.written_step),
        keys=keys if len(keys) > 1 or any(key.text.endswith("smoothed") for key in keys) else (),
        wide=panel.wide,
    )


def smoothed(points: Points) -> Points:
    """Exponential moving average whose weights are normed, so that it begins at the first value (as Adam's moments are,
    Kingma and Ba 2015)."""
    keep = 1.0 - 1.0 / max(2.0, _SPAN * len(points))
    total, weight, found = 0.0, 0.0, []
    for step, value in points:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        found.append((step, total / weight))
    return found


def _before(validation: ValidationResult | None) -> dict[str, float | None]:
    """What the validation set said before the first step, by field."""
    if validation is None:
        return {}
    return {"validation_loss": validation.first, "validation_perplexity": validation.first_perplexity}


def _finite(records: Sequence[StepRecord], name: str) -> Points:
    pairs = ((row.step, getattr(row, name)) for row in records)
    return [(step, value) for step, value in pairs if value is not None and math.isfinite(value)]


def _thinned(points: Points) -> Points:
    """Every n-th point, and the last."""
    every = max(1, math.ceil(len(points) / MOST_POINTS))
    return [point for index, point in enumerate(points) if index % every == 0 or index == len(points) - 1]


def _round_steps(first: int, last: int, most: int) -> list[int]:
    """The first step, and round ones behind it."""
    step = next(
        factor * 10**power
        for power in range(20)
        for factor in (1, 2, 5)
        if (last - first) / (factor * 10**power) <= most
    )
    rounds = range((first // step + 1) * step, last + 1, step)
    return [*([first] if not rounds or rounds[0] - first >= step / 2 else []), *rounds]


def _marks(panel: Panel, records: Sequence[StepRecord], x: Scale, written_step: int | None) -> list[Mark]:
    """Where the run went on from a checkpoint, and the step that was written; with words in the first chart."""
    marks = [
        Mark(x.place(row.step), f"resumed from step {row.step - 1:,}" if panel.wide else "")
        for row in records
        if row.resumed
    ]
    if written_step is not None and 0 < written_step < records[-1].step and "validation_loss" in panel.fields:
        marks.append(Mark(x.place(written_step), f"best: step {written_step:,}", "best"))
    return marks


def _words(name: str) -> str:
    return name.replace("_", " ")
