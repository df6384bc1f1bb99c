"""The report's section on sizes: the source and the artifact as bars of their parts, and a table of the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from optc.compiler.artifact.sizes import Sizes
from optc.exporters.reports.numbers import EMPTY, percent, size

_UNKNOWN = "whole"


@dataclass(frozen=True)
class Segment:
    """A part of a bar: its class, its width in per cent of the longer bar, and texts."""

    style: str
    width: float
    text: str
    hint: str


@dataclass(frozen=True)
class SizeBar:
    """One model, its parts from the left."""

    label: str
    total: str
    segments: Sequence[Segment]


@dataclass(frozen=True)
class SizeRow:
    """A part: its class, name, bytes before and after, and share of what was written."""

    style: str
    title: str
    before: str
    after: str
    share: str


@dataclass(frozen=True)
class SizeSection:
    """Bars, rows, and whether the source's size is known at all."""

    bars: Sequence[SizeBar]
    rows: Sequence[SizeRow]
    has_source: bool


def size_section(sizes: Sizes | None, written_as: str) -> SizeSection | None:
    """What the template shows of the sizes; None of a program without weights.

    Args:
        written_as: the label of what was written.
    """
    if sizes is None or not sizes.total:
        return None
    titles = sizes.titles()
    after = {name: int(getattr(sizes, name)) for name in titles}
    before = {name: sizes.before.get(name, 0) for name in titles}
    longest = max(sizes.total, sizes.source or 0)
    bars = [_bar(written_as, sizes.total, after, titles, longest)]
    if sizes.source:
        # The files' headers and what no part accounts for are little; they are not shown as a part of their own.
        parts = before if sizes.before else {_UNKNOWN: sizes.source}
        bars.insert(0, _bar("source", sizes.source, parts, {**titles, _UNKNOWN: "all weights"}, longest))
    rows = [
        SizeRow(
            name,
            title,
            size(before[name]) if before[name] else EMPTY,
            size(after[name]) if after[name] else EMPTY,
            percent(after[name] / sizes.total) if after[name] else EMPTY,
        )
        for name, title in titles.items()
        if after[name] or before[name]
    ]
    return SizeSection(bars, rows, bool(sizes.source and sizes.before))


def _bar(label: str, total: int, parts: dict[str, int], titles: dict[str, str], longest: int) -> SizeBar:
    segments = [
        Segment(name, round(100 * value / longest, 3), titles[name], f"{titles[name]}: {size(value)}")
        for name, value in parts.items()
        if value
    ]
    return SizeBar(label, size(total), segments)
