"""report.html: what a compile did, for people. Self-contained: no network, no fonts; one small script sorts a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import msgspec

from optc.compiler.artifact.drift_table import drift_table
from optc.compiler.artifact.manifest import Manifest, PassRecord
from optc.compiler.artifact.sizes import group_text, megabytes
from optc.compiler.diagnostics import os_errors
from optc.exporters.reports.quantization import quantization_section

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 720, 260, 64, 34
_LONG = 40  # entries of a table's value beyond which only their number is shown
_COLORS = ("#2563eb", "#d97706", "#059669", "#be185d", "#7c3aed", "#0891b2", "#65a30d", "#57534e")


@dataclass(frozen=True)
class _Series:
    """One pass's drift per layer as an SVG polyline."""

    name: str
    color: str
    points: str
    dots: tuple[tuple[float, float, str], ...]


def write_report(directory: Path, manifest: Manifest) -> None:
    """Write `report.html` into an artifact folder, from its manifest and its `ir/` texts.

    Raises:
        ResourceError, InputError: the file cannot be written.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("optc.exporters.reports", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(number=_number, megabytes=megabytes, groups=group_text)
    stages = [(path.stem, path.read_text()) for path in sorted((directory / "ir").glob("*.txt"))]
    titles, cells = drift_table(msgspec.to_builtins(manifest.passes))
    text = environment.get_template("report.html").render(
        m=manifest,
        contract=manifest.contract,
        drift_titles=titles,
        drift_cells=cells,
        plot=drift_plot(manifest.passes),
        quantized=quantization_section(manifest),
        stages=stages,
        quality=_rows(manifest.quality),
        speed=_rows(manifest.speed),
        engine=_rows(manifest.engine_info),
        total=sum(entry.size for entry in manifest.files),
    )
    with os_errors("writing the report", str(directory / "report.html")):
        (directory / "report.html").write_text(text)


def _number(value: float | None, form: str = "{:.2e}") -> str:
    return "–" if value is None else form.format(value)


def _rows(table: dict[str, Any] | None) -> list[tuple[str, str]]:
    """A flat table for people: nested values as short JSON."""
    rows = []
    for key, value in (table or {}).items():
        if isinstance(value, list | tuple | dict) and len(value) > _LONG:
            rows.append((key.replace("_", " "), f"{len(value)}"))
            continue
        plain = isinstance(value, str | int | float | bool)
        text = (
            f"{value:,.4g}"
            if isinstance(value, float)
            else str(value)
            if plain
            else msgspec.json.encode(value).decode()
        )
        rows.append((key.replace("_", " "), text if len(text) < 400 else text[:400] + " …"))
    return rows


def drift_plot(passes: Sequence[PassRecord]) -> dict[str, Any] | None:
    """Geometry of the drift plot (relative L2 difference per layer, log scale); None without drift."""
    drifting = [row for row in passes if any(value > 0 for value in row.layer_drift)]
    values = [value for row in drifting for value in row.layer_drift if value > 0 and math.isfinite(value)]
    if not values:
        return None
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)
    count = max(len(row.layer_drift) for row in drifting)

    def x(layer: int) -> float:
        return _LEFT + (layer + 0.5) * (_WIDTH - _LEFT - 10) / count

    def y(value: float) -> float:
        share = (math.log10(min(max(value, 10.0**low), 10.0**high)) - low) / (high - low)
        return 10 + (1 - share) * (_HEIGHT - _BOTTOM - 10)

    series = []
    for index, row in enumerate(drifting):
        places = [(x(i), y(value), f"{row.name}, layer {i}: {value:.2e}") for i, value in enumerate(row.layer_drift)]
        points = " ".join(f"{px:.1f},{py:.1f}" for px, py, _ in places)
        series.append(_Series(row.name, _COLORS[index % len(_COLORS)], points, tuple(places)))
    step = max(1, (high - low) // 6)
    return {
        "width": _WIDTH,
        "height": _HEIGHT,
        "left": _LEFT,
        "bottom": _HEIGHT - _BOTTOM,
        "series": series,
        "levels": [(y(10.0**power), f"1e{power}") for power in range(low, high + 1, step)],
        "layers": [(x(i), i) for i in range(0, count, max(1, count // 16))],
    }
