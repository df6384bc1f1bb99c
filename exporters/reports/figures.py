"""What the sections on quality and speed are made of, and how figures are read that others may have written.

The figures are a manifest's, which any version of optc or a person may have written: what is not there, or is something
else, is left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from optc.exporters.reports.charts import Card, Table
from optc.exporters.reports.numbers import EMPTY, number, trimmed

Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """One side of a sample: who wrote it, what all sides begin with, and what follows."""

    title: str
    shared: str
    rest: str


@dataclass(frozen=True)
class Sample:
    """Continuations of a prompt, side by side."""

    prompt: str
    columns: Sequence[Column]
    note: str = ""


@dataclass(frozen=True)
class Section:
    """Cards, a sentence on how they were measured, tables, a sample, and figures that have no place of their own."""

    cards: Sequence[Card]
    note: str
    tables: Sequence[Table] = ()
    sample: Sample | None = None
    others: Sequence[tuple[str, str]] = ()


def sample_of(prompt: str, columns: Sequence[tuple[str, str]], note: str = "") -> Sample:
    """A sample with its common beginning split off, whole words of it."""
    letters = zip(*(text for _, text in columns), strict=False) if len(columns) > 1 else ()
    shared = "".join(row[0] for row in itertools.takewhile(lambda row: len(set(row)) == 1, letters))
    if any(len(text) > len(shared) for _, text in columns):
        shared = shared[: shared.rfind(" ") + 1]
    if not any(letter.isalnum() for letter in shared):
        shared = ""
    sides = [Column(title, shared, text[len(shared) :]) for title, text in columns]
    return Sample(prompt, sides, note)


def float_of(table: Figures, key: str) -> float | None:
    """A number; None for anything else."""
    value = table.get(key)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def pair_of(table: Figures, key: str) -> tuple[float, float] | None:
    """Two numbers."""
    value = table.get(key)
    if isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(item, int | float) for item in value):
        return float(value[0]), float(value[1])
    return None


def median_of(table: Figures, key: str) -> float | None:
    """Of a rate: its median."""
    rate = table.get(key)
    return float_of(rate, "median") if isinstance(rate, Mapping) else None


def interval_of(table: Figures, key: str, before: str = "95 %: ") -> str:
    """Of a rate: its interval as text, "" without one."""
    rate = table.get(key)
    found = pair_of(rate, "ci95") if isinstance(rate, Mapping) else None
    return "" if found is None else f"{before}{number(found[0])} to {number(found[1])}"


def others_of(table: Figures, known: set[str]) -> list[tuple[str, str]]:
    """(key, value) of the figures that have no place of their own."""
    return [(key.replace("_", " "), plain_text(value)) for key, value in table.items() if key not in known]


def plain_text(value: Any, longest: int = 400) -> str:
    """Any JSON value as a short text: numbers with few digits, lists of plain values with commas, others as JSON."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: EMPTY}[value]
    if isinstance(value, str):
        text = value
    elif isinstance(value, int):
        text = f"{value:,}"
    elif isinstance(value, float):
        text = trimmed(number(value, 4))
    elif isinstance(value, list | tuple) and all(isinstance(item, str | int | float) for item in value):
        text = ", ".join(plain_text(item) for item in value) or EMPTY
    elif isinstance(value, Mapping) and all(isinstance(item, str | int | float) for item in value.values()):
        text = ", ".join(f"{key} {plain_text(item)}" for key, item in value.items()) or EMPTY
    else:
        text = msgspec.json.encode(value).decode()
    return text if len(text) <= longest else text[:longest] + " …"
