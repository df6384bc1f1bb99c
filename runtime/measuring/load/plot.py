"""A picture of a load: throughput and latency against how many requests were open, or how many came a second."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2

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


def load_svg(runs: Sequence[dict[str, Any]], title: str, *, embeds: bool = False) -> str:
    """The SVG. `runs` are of one kind: each has "concurrency", or each has "rate".

    Args:
        embeds: they are of embeddings.
    """
    axis = "concurrency" if runs[0]["concurrency"] is not None else "rate"
    places = [float(run[axis]) for run in runs]
    label = "requests open at once" if axis == "concurrency" else "requests per second"
    panels = [_panel(name, lines, runs, places, label) for name, lines in (_EMBEDDING_LINES if embeds else _LINES)]
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(panels=panels, title=title, width=_WIDTH, height=_HEIGHT, total=_WIDTH * len(panels))


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
