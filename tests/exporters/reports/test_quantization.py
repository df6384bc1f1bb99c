"""The report's section on quantization: what it says of given records, and that the page is self-contained."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import pytest
from artifacts import make_manifest

from optc.compiler.artifact.manifest import Manifest
from optc.compiler.rewriting.quantization_record import LinearRecord
from optc.exporters.reports.quantization import COLUMNS, MOST_BARS, error_plot, quantization_section
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


class Page(HTMLParser):
    """Cells of the sortable table, and every address the page refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.links: list[str] = []
        self.inside = self.cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.links += [value or "" for key, value in attrs if key in ("src", "href", "action", "data")]
        self.inside = self.inside or (tag == "table" and given.get("class") == "sortable")
        if self.inside and tag == "tr":
            self.rows.append([])
        self.cell = self.inside and tag in ("td", "button")

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag != "table"
        self.cell = self.cell and tag not in ("td", "button")

    def handle_data(self, data: str) -> None:
        if self.cell:
            self.rows[-1].append(data)


def page(tmp_path: Path, given: Manifest) -> tuple[str, Page]:
    (tmp_path / "ir").mkdir()
    write_report(tmp_path, given)
    text = (tmp_path / "report.html").read_text()
    return text, Page(text)


def test_page_has_every_weight_worst_first(tmp_path: Path) -> None:
    rows = [record(f"w{i}", error=0.001 * (i + 1), error_rtn=0.1) for i in range(12)]
    text, found = page(tmp_path, manifest(*rows))
    assert found.rows[0] == [column.title for column in COLUMNS]
    assert [row[0] for row in found.rows[1:]] == [f"w{i}" for i in range(11, -1, -1)]
    assert found.rows[1][:8] == ["w11", "4 × 64", "gptq", "4", "32", "1.200e-02", "1.000e-01", "0.120"]
    assert text.count('<tr class="worst">') == 10
    assert found.links == [], "the page needs no other file"
    assert not re.search(r"https?://(?!www\.w3\.org)|@import|fetch\(|XMLHttp", text)
    assert "4.800" in text
    assert "1.067 ×" in text


def test_names_are_escaped(tmp_path: Path) -> None:
    text, found = page(tmp_path, manifest(record('<script>alert("x")</script>')))
    assert "<script>alert" not in text
    assert found.rows[1][0] == '<script>alert("x")</script>'


def test_without_calibration_the_weight_error_is_shown(tmp_path: Path) -> None:
    rows = [
        record(f"w{i}", error=None, error_rtn=None, damping=None, tokens=0, weight_error=10.0**-i) for i in (3, 1, 2)
    ]
    text, found = page(tmp_path, manifest(*rows))
    assert [row[0] for row in found.rows[1:]] == ["w1", "w2", "w3"]
    assert "The error of outputs was not measured" in text
    assert found.rows[1][5:9] == ["–", "–", "–", "1.000e-01"]


def test_no_section_without_quantization(tmp_path: Path) -> None:
    text, found = page(tmp_path, make_manifest(quantization={}))
    assert "<h2>Quantization</h2>" not in text
    assert found.rows == []
    assert quantization_section(make_manifest(quantization={})) is None


def test_a_module_has_no_cache_and_no_groups_of_0(tmp_path: Path) -> None:
    plain = make_manifest(quantization={**SUMMARY, "group_size": [0]})
    entry = plain.programs["model"]
    module = msgspec.structs.replace(entry.contract, kind="module", layers=())
    given = msgspec.structs.replace(plain, programs={"model": msgspec.structs.replace(entry, contract=module)})
    text, _ = page(tmp_path, given)
    assert "groups of a row, 2 weights" in text
    assert "KV cache" not in text
    assert "attention layers</span>" not in text
    assert "--inputs FILE.npz" in text


def test_plot_geometry() -> None:
    rows = [record("a", error_rtn=0.1, error=0.01), record("b", error_rtn=0.01, error=0.001)]
    plot = error_plot(rows)
    assert plot is not None
    tops = [bar.y for bar in plot["bars"]]
    assert [bar.kind for bar in plot["bars"]] == ["rtn", "written"] * 2
    assert tops[1] == pytest.approx(tops[2])
    assert tops[1] - tops[0] == pytest.approx(tops[3] - tops[1]), "a decade is a decade"
    for bar in plot["bars"]:
        assert bar.y + bar.height == pytest.approx(plot["bottom"])
        assert plot["left"] <= bar.x
        assert bar.x + bar.width <= plot["right"]
        assert bar.height > 0
    assert plot["bars"][0].title == "a: round to nearest 1.000e-01"


def test_plot_of_nothing_and_of_very_many() -> None:
    assert error_plot([]) is None
    assert error_plot([record("a", error=0.0, error_rtn=0.0)]) is None
    plot = error_plot([record(f"w{i}", error=0.001 * (i + 1)) for i in range(MOST_BARS + 5)])
    assert plot is not None
    assert (plot["shown"], plot["total"]) == (MOST_BARS, MOST_BARS + 5)
    names = {bar.title.partition(":")[0] for bar in plot["bars"]}
    assert "w4" not in names
    assert "w5" in names


def test_summary_figures() -> None:
    rows = [record("a", error=0.01, error_rtn=0.04), record("b", error=0.04, error_rtn=0.04, tokens=7)]
    section = quantization_section(manifest(*rows))
    assert section is not None
    assert ("0.50 ×", "round-to-nearest's output error, geometric mean") in section["summary"]
    assert ("7", "calibration tokens reached the weight that saw the fewest") in section["summary"]
    assert section["summary"][0] == ("2", "weights quantized")
