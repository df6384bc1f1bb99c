"""What charts are made of, in per cent of the plot: the template draws them in SVG that takes any width, with texts in HTML.

A plot is stretched to the width there is, and its lines are not; so a chart is as readable on a phone as on a screen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from optc.exporters.reports.scales import Scale, Tick

PALETTE = 6
"""Colours of series, `s1` to `s6` in the style sheet."""


@dataclass(frozen=True)
class Line:
    """A polyline.

    Attributes:
        style: classes: a colour, and "faint", "thick" or "limit".
        path: of SVG.
    """

    style: str
    path: str


@dataclass(frozen=True)
class Dot:
    """A round mark with a text for those who point at it."""

    style: str
    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Bar:
    """A rectangle with a text for those who point at it."""

    style: str
    x: float
    y: float
    width: float
    height: float
    text: str


@dataclass(frozen=True)
class Mark:
    """A line across the plot, with a text at its end."""

    place: float
    text: str
    style: str = ""


@dataclass(frozen=True)
class Key:
    """An entry of a legend; `form` is "line", "box", "dot" or "dash"."""

    style: str
    text: str
    form: str = "line"


@dataclass(frozen=True)
class Chart:
    """A plot with its axes.

    Attributes:
        title: what is shown, with its unit. note: a sentence below.
        x_title: what is along the lower axis.
        wide: it takes the width of the page; others stand side by side.
    """

    title: str
    y_ticks: Sequence[Tick]
    x_ticks: Sequence[Tick]
    x_title: str = ""
    lines: Sequence[Line] = ()
    dots: Sequence[Dot] = ()
    bars: Sequence[Bar] = ()
    marks: Sequence[Mark] = ()
    keys: Sequence[Key] = ()
    note: str = ""
    wide: bool = False


@dataclass(frozen=True)
class Row:
    """A row of a `RowChart`: a bar to `place` (None: no bar), and texts beside it."""

    label: str
    place: float | None
    text: str
    style: str = ""
    hint: str = ""


@dataclass(frozen=True)
class RowChart:
    """Bars that lie below each other, with names at their left.

    Attributes:
        limit: path of a line through the rows, in units of (per cent, rows); "" without one.
    """

    title: str
    rows: Sequence[Row]
    ticks: Sequence[Tick]
    limit: str = ""
    keys: Sequence[Key] = ()
    note: str = ""


@dataclass(frozen=True)
class Cell:
    """A field of a heat map: how dark it is (0 to 1), its number and a text for those who point at it."""

    shade: float
    text: str
    hint: str


@dataclass(frozen=True)
class HeatMap:
    """Fields by row and column; None where there is nothing. `keys` are (shade, text)."""

    title: str
    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Cell | None]]]
    keys: Sequence[tuple[float, str]] = ()
    note: str = ""


@dataclass(frozen=True)
class Card:
    """A figure with what it is; `note` is a second line."""

    value: str
    label: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Titles and rows of texts; columns of `text` are words, the others numbers."""

    titles: Sequence[str]
    rows: Sequence[Sequence[str]]
    text: frozenset[int] = field(default_factory=lambda: frozenset({0}))


def color(index: int) -> str:
    """The class of a series' colour."""
    return f"s{index % PALETTE + 1}"


def path(points: Sequence[tuple[float, float | None]], x: Scale, y: Scale) -> str:
    """The path through (x, y) points; it is broken where y is None or not finite."""
    words, pen_down = [], False
    for left, value in points:
        if value is None or not math.isfinite(value):
            pen_down = False
            continue
        words.append(f"{'L' if pen_down else 'M'}{x.place(left):g} {100 - y.place(value):g}")
        pen_down = True
    return " ".join(words)


def downward(ticks: Sequence[Tick]) -> list[Tick]:
    """Ticks of an upright axis, counted from the top."""
    return [Tick(100 - tick.place, tick.text) for tick in ticks]
