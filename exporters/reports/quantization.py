"""The report's section on quantization: cards, errors and bits of each weight, and a table, from the manifest's records."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from optc.compiler.artifact.manifest import Manifest
from optc.compiler.artifact.sizes import group_text
from optc.compiler.pipeline.quantization_summary import quantized_linears
from optc.compiler.rewriting.quantization_record import LinearRecord
from optc.exporters.reports.charts import Bar, Card, Chart, Key, Mark, downward
from optc.exporters.reports.heat_map import bits_map, layer_of
from optc.exporters.reports.numbers import count, number, percent, size
from optc.exporters.reports.scales import Scale, Tick, log_scale

WORST = 10
MOST_BARS = 240
WIDEST = 4.0
"""Of the bars of a weight, in per cent of the plot."""


@dataclass(frozen=True)
class Column:
    """A column of the table: what it shows and how numbers are written."""

    title: str
    help: str
    form: str = "{}"
    text: bool = False


COLUMNS = (
    Column("weight", "name in the model", text=True),
    Column("shape", "outputs × inputs"),
    Column("method", "quantization method", text=True),
    Column("bits", "bits per code"),
    Column("group", "weights per scale"),
    Column("error", "relative squared output error of what was written, on calibration inputs", "{:.3e}"),
    Column("RTN error", "the same of plain rounding to nearest", "{:.3e}"),
    Column("ratio", "error / RTN error", "{:.3f}"),
    Column("weight error", "relative squared error of the weight itself", "{:.3e}"),
    Column("scale min", "smallest scale", "{:.2e}"),
    Column("scale max", "largest scale", "{:.2e}"),
    Column("clip", "mean share of the full range that the grid covers; 1 is no clipping", "{:.3f}"),
    Column("damping", "added to the Hessian's diagonal, as a share of its mean", "{:.2g}"),
    Column("tokens", "calibration tokens that reached it"),
    Column("seconds", "time spent on it", "{:.2f}"),
    Column("note", "what the pass says", text=True),
)


def quantization_section(manifest: Manifest) -> dict[str, Any] | None:
    """What the template shows of a quantization; None without one.

    `rows` has the worst linear first: by output error on calibration inputs, or by weight error where there
    was no calibration. A cell is (text, what it sorts by); a column without a value is not there.
    """
    if not manifest.quantization:
        return None
    records = sorted(quantized_linears(manifest.passes), key=_badness, reverse=True)
    rows = [_cells(row) for row in records]
    known = [index for index in range(len(COLUMNS)) if any(row[index][1] for row in rows)]
    measured = any(row.error is not None for row in records)
    columns = [COLUMNS[index] for index in known]
    return {
        "summary": _summary(manifest, records),
        "ideal": manifest.quantization.get("ideal", ""),
        "bits": bits_map(quantized_linears(manifest.passes)),
        "errors": error_chart(quantized_linears(manifest.passes)),
        "columns": columns,
        "rows": [[row[index] for index in known] for row in rows],
        "worst": min(WORST, len(records)),
        "sorted_by": [column.title for column in columns].index("error" if measured else "weight error") if rows else 0,
    }


def _badness(record: LinearRecord) -> tuple[float, float]:
    """What records are sorted by. NaN, should there ever be one, is the worst."""
    values = (-1.0 if record.error is None else record.error, record.weight_error)
    return tuple(math.inf if math.isnan(value) else value for value in values)  # type: ignore[return-value]


def _summary(manifest: Manifest, records: Sequence[LinearRecord]) -> list[Card]:
    """The section's head."""
    table = manifest.quantization
    cards = [Card(f"{len(records) or table.get('linears', 0):,}", "weights quantized", group_text(table["group_size"]))]
    if "bits_per_parameter" in table:
        ideal = f"{table['ratio_to_ideal']:.3f} × the ideal of {table['ideal_bits']:.3f}"
        cards += [
            Card(f"{table['bits_per_parameter']:.3f}", "bits per parameter of these weights", ideal),
            Card(
                size(table["bytes"]),
                f"for {count(table['parameters'])} parameters",
                f"{percent(table['ratio_to_bf16'])} of their size in bf16",
            ),
        ]
    before = [row.error_rtn for row in records if row.error is not None and row.error_rtn]
    after = [row.error for row in records if row.error is not None and row.error_rtn]
    ratios = [a / b for a, b in zip(after, before, strict=True) if a > 0]
    if ratios:
        mean = math.exp(math.fsum(map(math.log, ratios)) / len(ratios))
        cards.append(Card(f"{mean:.2f} ×", "round-to-nearest's output error", "geometric mean over the weights"))
    tokens = [row.tokens for row in records if row.tokens]
    if tokens:
        what = "rows" if manifest.contract.kind == "module" else "tokens"
        cards.append(Card(f"{min(tokens):,}", f"calibration {what}", "reached the weight that saw the fewest"))
    return cards


def _cells(row: LinearRecord) -> list[tuple[str, str]]:
    ratio = row.error / row.error_rtn if row.error is not None and row.error_rtn else None
    values = (
        row.name,
        row.shape[0] * row.shape[1],
        row.method,
        row.bits,
        row.group_size,
        row.error,
        row.error_rtn,
        ratio,
        row.weight_error,
        row.scale_min,
        row.scale_max,
        row.clip,
        row.damping,
        row.tokens or None,
        row.seconds,
        row.note,
    )
    cells = []
    for column, value in zip(COLUMNS, values, strict=True):
        text = "–" if value is None else column.form.format(value)
        if column.title == "shape":
            text = f"{row.shape[0]} × {row.shape[1]}"
        if column.title == "group" and value == 0:
            text = "a row"
        cells.append((text, "" if value is None else str(value)))
    return cells


def error_chart(records: Sequence[LinearRecord]) -> Chart | None:
    """Bars of the error of each weight, in the program's order, on a log scale; None without any error.

    Two bars per weight (rounding to nearest, and what was written) where calibration measured them, else one of
    the weight error. Of more than `MOST_BARS` weights the worst are shown.
    """
    measured = any(row.error is not None for row in records)
    rows = [(row, errors) for row in records if (errors := _errors(row, measured))]
    if not rows:
        return None
    total = len(rows)
    if total > MOST_BARS:
        least = sorted((errors[-1][1] for _, errors in rows), reverse=True)[MOST_BARS - 1]
        rows = [item for item in rows if item[1][-1][1] >= least][:MOST_BARS]
    y = log_scale((value for _, errors in rows for _, value in errors), most=5)
    what = "output on the calibration inputs" if measured else "weight, as the error of outputs was not measured"
    return Chart(
        title=f"Relative squared error of each {what} (logarithmic scale)",
        y_ticks=downward(y.ticks),
        x_ticks=_layer_ticks([row for row, _ in rows]),
        x_title="layer" if any(layer_of(row.name) for row, _ in rows) else "weights in the program's order",
        bars=_bars(rows, y, measured),
        marks=_layer_marks([row for row, _ in rows]),
        keys=[Key("s2", "rounding to nearest", "box"), Key("s1", "as written", "box")] if measured else (),
        note=f"The {len(rows)} worst of {total} weights." if len(rows) < total else "",
        wide=True,
    )


_Errors = list[tuple[str, float]]


def _bars(rows: Sequence[tuple[LinearRecord, _Errors]], y: Scale, measured: bool) -> list[Bar]:
    bars, slot = [], 100 / len(rows)
    for place, (row, errors) in enumerate(rows):
        width = min(0.84 * slot, WIDEST) / len(errors)
        for index, (kind, value) in enumerate(errors):
            height = max(y.place(value), 0.4)  # the smallest is seen too
            text = f"{row.name}: {kind if measured else 'weight error'} {number(value)}"
            x = round((place + 0.5) * slot + (index - len(errors) / 2) * width, 3)
            bars.append(Bar("s2" if kind == _RTN else "s1", x, 100 - height, round(width, 3), height, text))
    return bars


_RTN = "rounding to nearest"


def _errors(row: LinearRecord, measured: bool) -> _Errors:
    """(kind, value) of the bars of one weight: positive and finite ones."""
    pairs = [(_RTN, row.error_rtn), ("as written", row.error)] if measured else [("as written", row.weight_error)]
    return [(kind, value) for kind, value in pairs if value is not None and 0 < value < math.inf]


def _layer_starts(rows: Sequence[LinearRecord]) -> list[tuple[int, str]]:
    """(index, layer) of each weight at which another layer begins, "" being none."""
    found: list[tuple[int, str]] = []
    before: object = ""  # no weight
    for index, row in enumerate(rows):
        layer = layer_of(row.name)
        if layer != before:
            found.append((index, "" if layer is None else str(layer[1])))
        before = layer
    return found


def _layer_ticks(rows: Sequence[LinearRecord], most: int = 16) -> list[Tick]:
    """The number of each layer, or of every n-th, below the middle of its weights."""
    starts = _layer_starts(rows)
    ends = [*(index for index, _ in starts[1:]), len(rows)]
    every = next(step for step in (1, 2, 4, 5, 8, 10, 16, 20, 1 << 30) if len(starts) <= most * step)
    middles = [(100 * (begin + end) / 2 / len(rows), text) for (begin, text), end in zip(starts, ends, strict=True)]
    return [Tick(round(place, 3), text) for index, (place, text) in enumerate(middles) if text and index % every == 0]


def _layer_marks(rows: Sequence[LinearRecord], most: int = 48) -> list[Mark]:
    """A faint line in front of each layer."""
    starts = _layer_starts(rows)[1:]
    return [Mark(round(100 * index / len(rows), 3), "", "faint") for index, _ in starts] if len(starts) <= most else []
