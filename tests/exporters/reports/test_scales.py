"""Axes and numbers of reports."""

from __future__ import annotations

import math

import pytest

from optc.exporters.reports.numbers import count, number, percent, seconds, size
from optc.exporters.reports.scales import index_ticks, linear_scale, log_scale


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0.0, "0"),
        (31.97, "32.0"),
        (1384.2, "1,384"),
        (0.0953, "0.0953"),
        (-0.5, "−0.500"),
        (2.134e-7, "2.13×10⁻⁷"),
        (-1e12, "−1.00×10¹²"),
        (math.inf, "∞"),
        (math.nan, "not a number"),
    ],
)
def test_numbers(value: float | None, text: str) -> None:
    assert number(value) == text


def test_units() -> None:
    assert [size(value) for value in (12, 999.6, 6_300_000, 15.4e9)] == ["12 B", "1.00 kB", "6.30 MB", "15.4 GB"]
    assert [count(value) for value in (4096, 3_150_000, 7_240_000_000)] == ["4,096", "3.15 M", "7.24 G"]
    assert [seconds(value) for value in (0.421, 12.34, 200, 3900)] == ["0.42 s", "12.3 s", "3 min 20 s", "1 h 05 min"]
    assert (percent(0.878), percent(0.031, signed=True), percent(-0.031, 2, signed=True)) == (
        "87.8 %",
        "+3.1 %",
        "−3.10 %",
    )
    assert percent(math.inf) == "∞"


@pytest.mark.parametrize(
    ("values", "options", "texts"),
    [
        ([1.2, 4.9], {}, ["1", "2", "3", "4", "5"]),
        ([0.1, 0.9], {"zero": True, "most": 4}, ["0", "0.25", "0.50", "0.75", "1.00"]),
        ([0.0, 0.00025], {"most": 5}, ["0", "0.00005", "0.00010", "0.00015", "0.00020", "0.00025"]),
        ([0, 12e6], {"most": 3}, ["0", "5×10⁶", "1×10⁷", "1.5×10⁷"]),
        ([0.0, 0.02], {"as_percent": True, "most": 4}, ["0 %", "0.5 %", "1.0 %", "1.5 %", "2.0 %"]),
        ([-1.0, 1.0], {"most": 4}, ["−1.0", "−0.5", "0", "0.5", "1.0"]),
        ([3.0, 3.0], {"most": 3}, ["1", "2", "3", "4", "5"]),
        ([], {"zero": True, "most": 4}, ["0", "0.25", "0.50", "0.75", "1.00"]),
    ],
)
def test_linear_axes_end_at_round_numbers(values: list[float], options: dict[str, int], texts: list[str]) -> None:
    scale = linear_scale(values, **options)
    assert [tick.text for tick in scale.ticks] == texts
    assert (scale.ticks[0].place, scale.ticks[-1].place) == (0, 100)
    assert all(scale.low <= value <= scale.high for value in values)


def test_logarithmic_axes() -> None:
    scale = log_scale([3e-4, 0.2])
    assert [tick.text for tick in scale.ticks] == ["10⁻⁴", "0.001", "0.01", "0.1", "1"]
    assert scale.place(0.01) == 50
    assert (scale.place(0.0), scale.place(9.0)) == (0, 100), "what is beyond is at the end"
    assert [tick.text for tick in log_scale([1e-9, 1.0], most=3).ticks] == ["10⁻⁹", "10⁻⁶", "0.001", "1"]
    assert [tick.text for tick in log_scale([0.1]).ticks] == ["0.1", "1"]


def test_layers_are_counted_in_round_steps() -> None:
    assert index_ticks(range(4)) == [(0, "0"), (1, "1"), (2, "2"), (3, "3")]
    assert [text for _, text in index_ticks(range(32))] == ["0", "4", "8", "12", "16", "20", "24", "28"]
