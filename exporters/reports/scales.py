"""Axes: where a value lies between 0 and 100 % of a plot, and ticks at round numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from optc.exporters.reports.numbers import power_of_ten, scientific, trimmed


@dataclass(frozen=True)
class Tick:
    """A round number of an axis: its place, 0 to 100, and its text. A minor one has a line and no text."""

    place: float
    text: str


@dataclass(frozen=True)
class Scale:
    """An axis from `low` (0) to `high` (100); values beyond are put at its ends."""

    low: float
    high: float
    ticks: tuple[Tick, ...]
    log: bool = False

    def place(self, value: float) -> float:
        """0 to 100."""
        return _place(value, self.low, self.high, self.log)


def _place(value: float, low: float, high: float, log: bool) -> float:
    if log:
        value, low, high = math.log10(max(value, low)), math.log10(low), math.log10(high)
    return round(100 * min(max((value - low) / (high - low), 0.0), 1.0), 3)


def linear_scale(values: Iterable[float], *, zero: bool = False, most: int = 5, as_percent: bool = False) -> Scale:
    """A scale that ends at round numbers.

    Args:
        values: finite, at least one.
        zero: 0 is on it.
        most: steps between ticks, about.
        as_percent: texts are per cent.
    """
    found = [*values, *([0.0] if zero else [])]
    low, high = min(found), max(found)
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        spread = abs(high) or 1.0
        low, high = (low, high + spread) if zero or low == 0 else (low - spread / 2, high + spread / 2)
    step = _round_step((high - low) / most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    places = [index * step for index in range(first, last + 1)]
    digits = max(0, -math.floor(math.log10(step * (100 if as_percent else 1)) + 1e-9))
    digits += 0 if float(f"{step * (100 if as_percent else 1):.{digits}f}") else 1
    texts = [_share(value, digits) if as_percent else _plain(value, step) for value in places]
    low, high = places[0], places[-1]
    ticks = (
        Tick(_place(value, low, high, False), text.replace("-", "−")) for value, text in zip(places, texts, strict=True)
    )
    return Scale(low, high, tuple(ticks))


def _round_step(least: float) -> float:
    """1, 2, 2.5 or 5 times a power of ten, at least so large."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= least * (1 - 1e-9))


def _share(value: float, digits: int) -> str:
    return f"{100 * value:.{digits}f} %" if round(100 * value, digits) else "0 %"


def _plain(value: float, step: float) -> str:
    """A tick's number with the digits that its step has."""
    if abs(value) < step / 2:
        return "0"
    if step >= 1e6 or step < 1e-5:
        return trimmed(scientific(value))
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    if round(step, digits) != step and abs(round(step, digits) - step) > 1e-9 * step:
        digits += 1
    return f"{value:,.{digits}f}"


def log_scale(values: Iterable[float], *, most: int = 6) -> Scale:
    """A scale of whole decades with ticks at powers of ten.

    Args:
        values: positive and finite, at least one.
    """
    found = list(values)
    low, high = math.floor(math.log10(min(found)) + 1e-9), math.ceil(math.log10(max(found)) - 1e-9)
    high = max(high, low + 1)
    every = max(1, math.ceil((high - low) / most))
    texts = {power: _decade(power) for power in range(high, low - 1, -every)}
    bottom, top = 10.0**low, 10.0**high
    ticks = (Tick(_place(10.0**power, bottom, top, True), texts.get(power, "")) for power in range(low, high + 1))
    return Scale(bottom, top, tuple(tick for tick in ticks if tick.text), log=True)


def _decade(power: int) -> str:
    return f"{10.0**power:g}" if -4 < power < 4 else power_of_ten(power)


def index_ticks(numbers: Sequence[int], *, most: int = 8) -> list[tuple[int, str]]:
    """(index, text) of some of these numbers, evenly: the first, and then every n-th for a round n."""
    every = next(step for step in (1, 2, 4, 5, 8, 10, 16, 20, 25, 32, 50, 100, 1 << 30) if len(numbers) <= step * most)
    return [(index, str(value)) for index, value in enumerate(numbers) if index % every == 0]
