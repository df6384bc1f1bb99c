"""A picture of a load: throughput and latency against how many requests were open, or how many came a second; as SVG, or
as PNG by Pillow."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2

from optc.compiler.diagnostics import TargetError, UsageError

_TEMPLATE = Path(__file__).with_name("plot.svg.jinja")
_WIDTH, _HEIGHT = 360, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 36, 44

_LINES = (
    ("Output tokens per second", (("", "output_tokens_per_s", None),)),
    ("Time to first token, ms", (("p50", "ttft_ms", "p50"), ("p99", "ttft_ms", "p99"))),
    ("Time per output token, ms", (("p50", "tpot_ms", "p50"), ("p99", "tpot_ms", "p99"))),
)

_EMBEDDING_LINES = (
    ("Requests per second", (("", "requests_per_s", None),)),
    ("Time to the embedding, ms", (("p50", "e2e_ms", "p50"), ("p99", "e2e_ms", "p99"))),
)


_INK, _TEXT, _GRID, _LINE = "#1c1d1f", "#5f636b", "#d9dade", "#2457c5"
_PIXELS = 2
"""Of a PNG for each unit."""


def check_plot(path: Path) -> None:
    """Refuse a file that no plot can be written to, before anything is measured.

    Raises:
        UsageError: it is neither SVG nor PNG. TargetError: PNG, and Pillow is not installed.
    """
    kind = path.suffix.lower()
    if kind not in (".svg", ".png"):
        raise UsageError(f"--plot {path.name} is neither .svg nor .png", remedy="name the file load.svg or load.png")
    if kind == ".png":
        _pillow()


def load_plot(runs: Sequence[dict[str, Any]], title: str, path: Path, *, embeds: bool = False) -> bytes:
    """What is to be written into a file that `check_plot` took; see `load_svg`."""
    if path.suffix.lower() == ".png":
        return _png(_panels(runs, embeds), title)
    return load_svg(runs, title, embeds=embeds).encode()


def load_svg(runs: Sequence[dict[str, Any]], title: str, *, embeds: bool = False) -> str:
    """The SVG. `runs` are of one kind: each has "concurrency", or each has "rate".

    Args:
        embeds: they are of embeddings.
    """
    panels = _panels(runs, embeds)
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(panels=panels, title=title, width=_WIDTH, height=_HEIGHT, total=_WIDTH * len(panels))


def _panels(runs: Sequence[dict[str, Any]], embeds: bool) -> list[dict[str, Any]]:
    axis = "concurrency" if runs[0]["concurrency"] is not None else "rate"
    places = [float(run[axis]) for run in runs]
    label = "requests open at once" if axis == "concurrency" else "requests per second"
    return [_panel(name, lines, runs, places, label) for name, lines in (_EMBEDDING_LINES if embeds else _LINES)]


def _pillow() -> Any:
    try:
        import PIL.Image
        import PIL.ImageDraw
        import PIL.ImageFont
    except ImportError as error:
        raise TargetError(
            "a PNG needs the package Pillow, which is not installed",
            remedy="pip install 'optc[serve]', or name the file load.svg",
        ) from error
    return PIL


def _png(panels: Sequence[dict[str, Any]], title: str) -> bytes:
    """The same picture as the SVG's, in pixels."""
    pillow, unit = _pillow(), _PIXELS
    image = pillow.Image.new("RGB", (_WIDTH * len(panels) * unit, (_HEIGHT + 24) * unit), "#fff")
    draw = pillow.ImageDraw.Draw(image)
    small, large = (pillow.ImageFont.load_default(size * unit) for size in (11, 13))

    def write(x: float, y: float, text: str, anchor: str, fill: str = _TEXT, font: Any = small) -> None:
        draw.text((x * unit, y * unit), text, fill=fill, font=font, anchor=anchor)

    write(16, 18, title, "ls", _INK, large)
    for number, panel in enumerate(panels):
        left, down = number * _WIDTH, 24
        write(left + panel["left"], down + 20, panel["title"], "ls", _INK)
        for y, text in panel["y_ticks"]:
            ends = [((left + panel[side]) * unit, (down + y) * unit) for side in ("left", "right")]
            draw.line(ends, fill=_GRID, width=unit)
            write(left + panel["left"] - 6, down + y + 4, text, "rs")
        for x, text in panel["x_ticks"]:
            write(left + x, down + panel["bottom"] + 16, text, "ms")
        write(left + (panel["left"] + panel["right"]) / 2, down + panel["bottom"] + 34, panel["label"], "ms")
        for line in panel["lines"]:
            points = [((left + x) * unit, (down + y) * unit) for x, y in line["points"]]
            for begin, end in _strokes(points, 5 * unit if line["dashed"] else 0):
                draw.line([begin, end], fill=_LINE, width=2 * unit)
            for x, y in points:
                draw.circle((x, y), 3 * unit, fill=_LINE)
            x, y = line["points"][-1]
            write(left + x, down + y - 7, line["label"], "rs", _LINE)
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


_Point = tuple[float, float]


def _strokes(points: Sequence[_Point], dash: float) -> Iterator[tuple[_Point, _Point]]:
    """The parts of a line through these points that are drawn; `dash` is the length of one, 0 draws all."""
    for (x, y), (to_x, to_y) in itertools.pairwise(points):
        length = math.hypot(to_x - x, to_y - y)
        count = max(1, round(length / dash / 2)) if dash else 1
        for part in range(count):
            shares = (part / count, (part + (0.5 if dash else 1)) / count)
            begin, end = ((x + (to_x - x) * share, y + (to_y - y) * share) for share in shares)
            yield begin, end


def _panel(
    title: str,
    lines: Sequence[tuple[str, str, str | None]],
    runs: Sequence[dict[str, Any]],
    places: list[float],
    label: str,
) -> dict[str, Any]:
    values = [[_value(run[name], percent) for run in runs] for _, name, percent in lines]
    top = _round_up(max((value for line in values for value in line), default=1.0))
    left, right = _LEFT, _WIDTH - _RIGHT

    def x(place: float) -> float:
        low, high = min(places), max(places)
        share = math.log(place / low) / math.log(high / low) if high > low else 0.5
        return round(left + share * (right - left), 1)

    def y(value: float) -> float:
        return round(_HEIGHT - _BOTTOM - value / top * (_HEIGHT - _BOTTOM - _TOP), 1)

    drawn = [
        {
            "label": name,
            "points": [(x(place), y(value)) for place, value in zip(places, line, strict=True)],
            "dashed": index == 1,
        }
        for index, ((name, _, _), line) in enumerate(zip(lines, values, strict=True))
    ]
    return {
        "title": title,
        "label": label,
        "lines": drawn,
        "x_ticks": [(x(place), f"{place:g}") for place in places],
        "y_ticks": [(y(top * i / 4), f"{top * i / 4:g}") for i in range(5)],
        "left": left,
        "right": right,
        "bottom": _HEIGHT - _BOTTOM,
    }


def _value(found: Any, percent: str | None) -> float:
    if percent is None:
        return float(found)
    return float(found[percent]["value"]) if found else 0.0


def _round_up(value: float) -> float:
    """The next of 1, 2, 4, 5, 8 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(step * power for step in (1, 2, 4, 5, 8, 10) if step * power >= value)
