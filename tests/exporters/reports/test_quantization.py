"""The report's section on quantization: what it says of given records, and that the page is self-contained."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
from artifacts import make_manifest
from html_pages import Page

from optc.compiler.artifact.manifest import Manifest
from optc.compiler.rewriting.quantization_record import LinearRecord
from optc.exporters.reports.heat_map import bits_map
from optc.exporters.reports.quantization import COLUMNS, MOST_BARS, error_chart, quantization_section
from optc.exporters.reports.report import write_report

SUMMARY = {
    "method": "gptq",
    "bits": [4],
    "group_size": [32],
    "symmetric": True,
    "linears": 2,
    "parameters": 1000,
    "bytes": 600,
    "bits_per_parameter": 4.8,
    "ideal_bits": 4.5,
    "ideal": "a formula",
    "ratio_to_ideal": 1.0667,
    "ratio_to_bf16": 0.3,
}


def record(name: str, **changes: Any) -> LinearRecord:
    fields: dict[str, Any] = {
        "name": name,
        "shape": (4, 64),
        "method": "gptq",
        "bits": 4,
        "group_size": 32,
        "symmetric": True,
        "weight_error": 0.01,
        "scale_min": 0.001,
        "scale_max": 0.5,
        "error_rtn": 0.02,
        "error": 0.01,
        "clip": 0.9,
        "damping": 0.01,
        "tokens": 4096,
    }
    return LinearRecord(**{**fields, **changes})


def manifest(*records: LinearRecord, **changes: Any) -> Manifest:
    plain = make_manifest(quantization=SUMMARY, **changes)
    return msgspec.structs.replace(plain, passes=(msgspec.structs.replace(plain.passes[0], linears=records),))


def page(tmp_path: Path, given: Manifest) -> Page:
    write_report(tmp_path, given)
    return Page((tmp_path / "report.html").read_text())


def weights(found: Page) -> list[list[str]]:
    """The sortable table."""
    (table,) = (rows for rows in found.tables if rows[0][0] == "weight")
    return table


def test_page_has_every_weight_worst_first(tmp_path: Path) -> None:
    rows = [record(f"w{i}", error=0.001 * (i + 1), error_rtn=0.1) for i in range(12)]
    found = page(tmp_path, manifest(*rows))
    table = weights(found)
    assert table[0] == [column.title for column in COLUMNS if column.title != "note"]
    assert [row[0] for row in table[1:]] == [f"w{i}" for i in range(11, -1, -1)]
    assert table[1][:8] == ["w11", "4 × 64", "gptq", "4", "32", "1.200e-02", "1.000e-01", "0.120"]
    assert len(found.of_class("worst")) == 10
    assert found.card("bits per parameter of these weights") == ("4.800", "1.067 × the ideal of 4.500")
    found.check_alone()


def test_without_calibration_the_weight_error_is_shown(tmp_path: Path) -> None:
    rows = [
        record(f"w{i}", error=None, error_rtn=None, damping=None, tokens=0, weight_error=10.0**-i) for i in (3, 1, 2)
    ]
    found = page(tmp_path, manifest(*rows))
    assert [row[0] for row in weights(found)[1:]] == ["w1", "w2", "w3"]
    assert "as the error of outputs was not measured" in found.texts["quantization"]
    shown = ["weight", "shape", "method", "bits", "group", "weight error", "scale min", "scale max", "clip"]
    assert weights(found)[0][:9] == shown, "a column without a value is not there"
    assert weights(found)[1][5] == "1.000e-01"
    assert [given["aria-sort"] for _, given in found.tags if "aria-sort" in given] == ["descending"]


def test_no_section_without_quantization(tmp_path: Path) -> None:
    found = page(tmp_path, make_manifest(quantization={}))
    assert "quantization" not in found.texts
    assert quantization_section(make_manifest(quantization={})) is None


def test_a_module_has_no_cache_and_no_groups_of_0(tmp_path: Path) -> None:
    plain = make_manifest(quantization={**SUMMARY, "group_size": [0]})
    entry = plain.programs["model"]
    module = msgspec.structs.replace(entry.contract, kind="module", layers=())
    given = msgspec.structs.replace(plain, programs={"model": msgspec.structs.replace(entry, contract=module)})
    found = page(tmp_path, given)
    assert found.card("quantization") == ("4-bit gptq", "groups of a row, 2 weights")
    assert not [label for _, label, _ in found.cards if "cache" in label or "attention" in label]
    assert "--inputs FILE.npz" in found.texts["quality"]
    assert weights(page(tmp_path, manifest(record("w", group_size=0))))[1][4] == "a row"


def test_bars_are_decades_of_the_errors() -> None:
    rows = [record("a", error_rtn=0.1, error=0.01), record("b", error_rtn=0.01, error=0.001)]
    chart = error_chart(rows)
    assert chart is not None
    assert [(tick.text, tick.place) for tick in chart.y_ticks] == [("0.001", 100), ("0.01", 50), ("0.1", 0)]
    assert [(bar.style, bar.height) for bar in chart.bars] == [("s2", 100), ("s1", 50), ("s2", 50), ("s1", 0.4)]
    assert all(bar.y + bar.height == pytest.approx(100) and bar.x + bar.width <= 100 for bar in chart.bars)
    assert chart.bars[0].text == "a: rounding to nearest 0.100"
    assert [key.text for key in chart.keys] == ["rounding to nearest", "as written"]


def test_bars_of_nothing_and_of_very_many() -> None:
    assert error_chart([]) is None
    assert error_chart([record("a", error=0.0, error_rtn=0.0)]) is None
    assert error_chart([record("a", error=math.inf, error_rtn=None)]) is None
    chart = error_chart([record(f"w{i}", error=0.001 * (i + 1)) for i in range(MOST_BARS + 5)])
    assert chart is not None
    assert chart.note == f"The {MOST_BARS} worst of {MOST_BARS + 5} weights."
    names = {bar.text.partition(":")[0] for bar in chart.bars}
    assert "w4" not in names
    assert "w5" in names


def test_layers_are_ticks_below_the_bars() -> None:
    names = [f"model.layers.{layer}.{part}.weight" for layer in (0, 1, 2) for part in ("q", "k", "v", "o")]
    chart = error_chart([record(name) for name in (*names, "lm_head.weight")])
    assert chart is not None
    assert [tick.text for tick in chart.x_ticks] == ["0", "1", "2"]
    assert [tick.place for tick in chart.x_ticks] == pytest.approx(
        [100 * middle / 13 for middle in (2, 6, 10)], abs=1e-3
    )
    assert [mark.place for mark in chart.marks] == pytest.approx([100 * start / 13 for start in (4, 8, 12)], abs=1e-3)


def test_bits_are_a_heat_map_where_they_differ(tmp_path: Path) -> None:
    chosen = {("q_proj", 0): 2, ("q_proj", 1): 8, ("experts.0.up", 0): 4, ("experts.1.up", 0): 2}
    rows = [record(f"model.layers.{layer}.{part}.weight", bits=bits) for (part, layer), bits in chosen.items()]
    found = bits_map([*rows, record("lm_head.weight", bits=8)])
    assert found is not None
    assert found.columns == ["0", "1"]
    cells = {name: [cell and (cell.text, cell.shade) for cell in row] for name, row in found.rows}
    assert cells["q_proj"] == [("2", 0.1), ("8", 0.95)]
    assert cells["experts.*.up"] == [("2–4", 0.242), None]  # the mean, 3 bits, is a sixth of the way
    assert [text for _, text in found.keys] == ["2 bits", "4 bits", "8 bits"]
    assert found.note == "Outside of layers: lm_head.weight 8 bits"
    assert bits_map([record(f"model.layers.{layer}.q.weight") for layer in (0, 1)]) is None
    table = next(rows for rows in page(tmp_path, manifest(*rows)).tables if rows[0][0] == "q_proj")
    assert table == [["q_proj", "2", "8"], ["experts.*.up", "2–4", ""], ["layer", "0", "1"]]


def test_summary_figures(tmp_path: Path) -> None:
    rows = [record("a", error=0.01, error_rtn=0.04), record("b", error=0.04, error_rtn=0.04, tokens=7)]
    found = page(tmp_path, manifest(*rows))
    assert found.card("round-to-nearest's output error")[0] == "0.50 ×"
    assert found.card("calibration tokens")[0] == "7"
    assert found.card("weights quantized") == ("2", "groups of 32")
