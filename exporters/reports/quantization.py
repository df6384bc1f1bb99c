"""The report's section on quantization: figures of the plot and rows of the table, from the manifest's records."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from optc.compiler.artifact.manifest import Manifest
from optc.compiler.pipeline.quantization_summary import quantized_linears
from optc.compiler.rewriting.quantization_record import LinearRecord

WORST = 10
MOST_BARS = 240
_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM, _RIGHT = 960, 280, 64, 10, 34, 10


@dataclass(frozen=True)
class Bar:
    """One bar of the plot; `kind` is "rtn" or "written"."""

    kind: str
    x: float
    y: float
    width: float
    height: float
    title: str


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
    Column("group", "weights per scale; 0 is a whole row"),
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
    was no calibration. A cell is (text, what it sorts by).
    """
    if not manifest.quantization:
        return None
    records = sorted(quantized_linears(manifest.passes), key=_badness, reverse=True)
    return {
        "summary": _summary(manifest, records),
        "ideal": manifest.quantization.get("ideal", ""),
        "plot": error_plot(quantized_linears(manifest.passes)),
        "columns": COLUMNS,
        "rows": [_cells(row) for row in records],
        "worst": min(WORST, len(records)),
        "sorted_by": 5 if any(row.error is not None for row in records) else 8,
    }


def _badness(record: LinearRecord) -> tuple[float, float]:
    """What records are sorted by. NaN, should there ever be one, is the worst."""
    values = (-1.0 if record.error is None else record.error, record.weight_error)
    return tuple(math.inf if math.isnan(value) else value for value in values)  # type: ignore[return-value]


def _summary(manifest: Manifest, records: Sequence[LinearRecord]) -> list[tuple[str, str]]:
    """(figure, label) of the section's head."""
    table = manifest.quantization
    rows = [(f"{len(records)}" if records else f"{table.get('linears', 0)}", "weights quantized")]
    if "bits_per_parameter" in table:
        rows += [
            (
                f"{table['bits_per_parameter']:.3f}",
                "bits per parameter of the quantized weights, counted from the files",
            ),
            (
                f"{table['ratio_to_ideal']:.3f} ×",
                f"the ideal of {table['ideal_bits']:.3f} bits",
            ),
            (f"{table['ratio_to_bf16']:.1%}", "of their size in bf16"),
            (f"{table['bytes'] / 1e6:.2f} MB", f"for {table['parameters'] / 1e6:.2f} M parameters"),
        ]
    before = [row.error_rtn for row in records if row.error is not None and row.error_rtn]
    after = [row.error for row in records if row.error is not None and row.error_rtn]
    if before:
        ratios = [a / b for a, b in zip(after, before, strict=True) if a > 0]
        if ratios:
            mean = math.exp(math.fsum(map(math.log, ratios)) / len(ratios))
            rows.append((f"{mean:.2f} ×", "round-to-nearest's output error, geometric mean"))
    tokens = [row.tokens for row in records if row.tokens]
    if tokens:
        rows.append((f"{min(tokens):,}", "calibration tokens reached the weight that saw the fewest"))
    return rows


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
        row.tokens,
        row.seconds,
        row.note,
    )
    cells = []
    for column, value in zip(COLUMNS, values, strict=True):
        text = "–" if value is None else column.form.format(value)
        if column.title == "shape":
            text = f"{row.shape[0]} × {row.shape[1]}"
        cells.append((text, "" if value is None else str(value)))
    return cells


def error_plot(records: Sequence[LinearRecord]) -> dict[str, Any] | None:
    """Bars of the error per weight, in the program's order, on a log scale; None without any error.

    Two bars per weight (rounding to nearest, and what was written) where calibration measured them, else one of
    the weight error. Of more than `MOST_BARS` weights the worst are shown.
    """
    measured = any(row.error is not None for row in records)
    rows = [(row, _errors(row, measured)) for row in records]
    rows = [item for item in rows if item[1]]
    if len(rows) > MOST_BARS:
        worst = sorted(rows, key=lambda item: item[1][-1][1], reverse=True)[:MOST_BARS]
        kept = {item[0].name for item in worst}
        rows = [item for item in rows if item[0].name in kept]
    values = [value for _, errors in rows for _, value in errors]
    if not values:
        return None
    low, high = math.floor(math.log10(min(values)) - 0.1), math.ceil(math.log10(max(values)))
    bottom, slot = _HEIGHT - _BOTTOM, (_WIDTH - _LEFT - _RIGHT) / len(rows)

    def y(value: float) -> float:
        return _TOP + (high - math.log10(value)) / (high - low) * (bottom - _TOP)

    bars = []
    for place, (row, errors) in enumerate(rows):
        width = 0.84 * slot / len(errors)
        for number, (kind, value) in enumerate(errors):
            x = _LEFT + place * slot + 0.08 * slot + number * width
            title = f"{row.name}: {_KINDS[kind] if measured else 'weight error'} {value:.3e}"
            bars.append(Bar(kind, x, y(value), width, bottom - y(value), title))
    step = max(1, (high - low) // 6)
    return {
        "width": _WIDTH,
        "height": _HEIGHT,
        "left": _LEFT,
        "right": _WIDTH - _RIGHT,
        "bottom": bottom,
        "bars": bars,
        "levels": [(y(10.0**power), f"1e{power}") for power in range(low, high + 1, step)],
        "measured": measured,
        "shown": len(rows),
        "total": len(records),
    }


_KINDS = {"rtn": "round to nearest", "written": "written"}


def _errors(row: LinearRecord, measured: bool) -> list[tuple[str, float]]:
    """(kind, value) of the bars of one weight: positive and finite ones."""
    pairs = [("rtn", row.error_rtn), ("written", row.error)] if measured else [("written", row.weight_error)]
    return [(kind, value) for kind, value in pairs if value is not None and 0 < value < math.inf]
