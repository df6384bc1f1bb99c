"""The report's charts of what the passes cost: summed up since the capture beside what was allowed, and by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from optc.compiler.artifact.drift_table import program_title
from optc.compiler.artifact.manifest import DriftRecord, PassRecord
from optc.exporters.reports.charts import Chart, Dot, Key, Line, Row, RowChart, color, downward, path
from optc.exporters.reports.numbers import number, percent
from optc.exporters.reports.scales import Scale, Tick, index_ticks, linear_scale, log_scale

_MOST_DECADES = 7
"""Sums that are smaller than this many decades below the largest are drawn as nothing."""
_MOST_SERIES = 6
SEEN = 1e-5
"""KL or relative error from which on passes that keep the numbers have a chart: those of 16-bit types."""


@dataclass(frozen=True)
class Measure:
    """A measure of drift: its field in `DriftRecord` and `AllowedRecord`, how it is drawn, and how it is written."""

    field: str
    title: str
    log: bool
    text: Callable[[float | None], str]
    is_share: bool = False

    def drawn(self, value: float) -> float:
        """Shares of equal tokens are drawn as shares of changed ones, so that a longer bar is a larger loss."""
        return 1.0 - value if self.is_share else value


_KL = Measure("kl", "KL divergence since the capture, nats per {row}", True, number)
_TOP1 = Measure("top1_agreement", "Share of {row}s with another most likely {outcome}", False, percent, is_share=True)
_PERPLEXITY = Measure(
    "perplexity_increase", "Change of perplexity on the gate's text", False, lambda value: percent(value, signed=True)
)
_RELATIVE = Measure("relative_error", "Relative error of the outputs since the capture", True, number)


def measure_text(field: str, value: float | None) -> str:
    """A measure of `DriftRecord`, by its field."""
    if value is not None and field == "cosine":
        return f"{value:.5f}"
    known = {item.field: item.text for item in (_KL, _TOP1, _PERPLEXITY)}
    return known.get(field, lambda other: number(other, 2))(value)


def cumulative_charts(passes: Sequence[PassRecord], row: str = "token", outcome: str = "token") -> list[RowChart]:
    """For each program and measure a row per pass: `since_capture`, and `allowed` as a line through the rows.

    Args:
        row: what has a distribution: a token, or an answer of a classifier. outcome: what it is over.
    """
    charts = []
    programs = list(dict.fromkeys(item.program for item in passes))
    for program in programs:
        rows = [item for item in passes if item.program == program and item.since_capture is not None]
        name = "" if len(programs) == 1 else f"{program_title(program, programs)}: "
        for measure in _measures(rows):
            title = measure.title.format(row=row, outcome=outcome)
            charts.append(_cumulative(f"{name}{title}", measure, rows))
    return charts


def _measures(rows: Sequence[PassRecord]) -> list[Measure]:
    """Those that were taken and say something: a distribution is judged as one, other outputs by their error.

    Where no pass may change the numbers, what is left is rounding, which has no chart unless it is seen.
    """
    known = [row.since_capture for row in rows if row.since_capture is not None]
    lossy = any(row.lossy for row in rows)
    if not any(drift.kl is not None for drift in known):
        return [_RELATIVE] if max((drift.relative_error or 0 for drift in known), default=0) > SEEN or lossy else []
    if not lossy:
        return [_KL] if max(drift.kl or 0 for drift in known) > SEEN else []
    changed = [item for item in (_TOP1, _PERPLEXITY) if any(_loss(drift, item) for drift in known)]
    return [_KL, *changed]


def _loss(drift: DriftRecord, measure: Measure) -> float:
    """What is drawn of a measure; 0 where it was not taken."""
    value = _value(drift, measure)
    return 0.0 if value is None else measure.drawn(value)


def _value(drift: DriftRecord | None, measure: Measure) -> float | None:
    value = None if drift is None else getattr(drift, measure.field)
    return value if value is not None and math.isfinite(value) else None


def _cumulative(title: str, measure: Measure, passes: Sequence[PassRecord]) -> RowChart:
    values = [_value(row.since_capture, measure) for row in passes]
    limits = [None if row.allowed is None else getattr(row.allowed, measure.field) for row in passes]
    scale = _scale(measure, [measure.drawn(value) for value in (*values, *limits) if value is not None])
    rows = []
    for row, value, limit in zip(passes, values, limits, strict=True):
        place = None if value is None else scale.place(measure.drawn(value))
        text = measure.text(None if value is None else measure.drawn(value))
        most = measure.text(None if limit is None else measure.drawn(limit))
        hint = f"{row.name}: {text}" + ("" if limit is None else f" of {most} allowed")
        rows.append(Row(row.name, place, text, "s1" if row.lossy else "exact", hint))
    places = [None if limit is None else scale.place(measure.drawn(limit)) for limit in limits]
    last = next((limit for limit in reversed(limits) if limit is not None), None)
    keys = [Key("exact", "pass that keeps the numbers", "box")] if any(not row.lossy for row in passes) else []
    keys += [Key("s1", "pass that may change them", "box")] if any(row.lossy for row in passes) else []
    if last is not None:
        keys.append(Key("limit", f"allowed in all: {measure.text(measure.drawn(last))} at the end", "line"))
    note = "logarithmic scale" if measure.log else ""
    return RowChart(title, rows, scale.ticks, _limit_path(places), keys, note)


def _scale(measure: Measure, values: Sequence[float]) -> Scale:
    if not measure.log:
        return linear_scale((value for value in values if value > 0), zero=True, most=2, as_percent=True)
    positive = [value for value in values if value > 0]
    if not positive:
        return log_scale([1e-3, 1.0], most=4)
    least = max(positive) * 10.0**-_MOST_DECADES
    return log_scale([value for value in positive if value >= least], most=4)


def _limit_path(places: Sequence[float | None]) -> str:
    """Down through the rows, and across where the limit grows; in units of (per cent, rows)."""
    words, before = [], None
    for row, place in enumerate(places):
        if place is not None:
            words.append(f"{'M' if before is None else 'L'}{place:g} {row} L{place:g} {row + 1}")
        before = place
    return " ".join(words)


def layer_chart(passes: Sequence[PassRecord]) -> Chart | None:
    """The relative difference of each attention layer's output that each lossy pass made, or where there is none each of
    the passes that moved them the most; None where no pass moved a layer."""
    moved = [row for row in passes if _largest(row) > 0]
    shown = [row for row in moved if row.lossy] or sorted(moved, key=_largest, reverse=True)[:_MOST_SERIES]
    if not shown:
        return None
    left = max((_largest(row) for row in moved if row not in shown), default=0.0)
    values = [value for row in shown for value in row.layer_drift if 0 < value < math.inf]
    count = max(len(row.layer_drift) for row in shown)
    x, y = Scale(-0.5, count - 0.5, ()), log_scale(values, most=5)
    lines, dots = [], []
    for index, row in enumerate(shown):
        points = [(float(i), value if value > 0 else None) for i, value in enumerate(row.layer_drift)]
        lines.append(Line(color(index), path(points, x, y)))
        dots += [
            Dot(color(index), x.place(i), 100 - y.place(value), f"{_title(row)}, layer {int(i)}: {number(value)}")
            for i, value in points
            if value is not None
        ]
    return Chart(
        title="Relative L2 difference of each attention layer's output from the stage before (logarithmic scale)",
        y_ticks=downward(y.ticks),
        x_ticks=[Tick(x.place(index), text) for index, text in index_ticks(range(count), most=16)],
        x_title="attention layer",
        lines=lines,
        dots=dots,
        keys=[Key(color(index), _title(row)) for index, row in enumerate(shown)],
        note=f"All other passes moved no layer by more than {number(left, 2)}." if left else "",
        wide=True,
    )


def _largest(row: PassRecord) -> float:
    return max((value for value in row.layer_drift if math.isfinite(value)), default=0.0)


def _title(row: PassRecord) -> str:
    return row.name if row.program == "model" else f"{row.program}: {row.name}"
