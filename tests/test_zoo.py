"""The zoo's tables in docs/models.md are what its results say; its sizes are small, and its children are contained."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import zoo
import zoo_table
from zoo_models import Kind, build

_RESULTS = ROOT / "benchmarks" / "results" / "zoo.json"
_DOCS = ROOT / "docs" / "models.md"


def test_docs_say_what_the_results_say() -> None:
    """`python benchmarks/zoo.py --docs` writes them."""
    assert zoo_table.section(json.loads(_RESULTS.read_text())) in _DOCS.read_text()


def test_nothing_is_wrong_crashed_or_hung() -> None:
    rows = [row for stage in json.loads(_RESULTS.read_text())["stages"].values() for row in stage.values()]
    assert {row["outcome"] for row in rows} <= {"exact", "uncached", "refused", "not built"}


def test_counts_and_reasons() -> None:
    made = {"torch": "2", "transformers": "1"}
    capture = {
        "causal:a": {"outcome": "exact", **made},
        "causal:b": {"outcome": "refused", "reason": "no | way", **made},
        "causal:d": {"outcome": "exact", **made},
        "masked:c": {"outcome": "not built", **made},
    }
    target = {
        "causal:a": {"outcome": "exact", **made},
        "causal:b": {"outcome": "refused", "reason": "no | way", **made},
    }
    text = zoo_table.section({"stages": {"capture": capture, "x-cpu": target}})
    assert "capture: 3 with torch 2 and transformers 1. x-cpu: 2 with torch 2" in text
    assert "| capture | causal | 3 | 2 (66.7%) | 0 | 1 | 0 | 0 | 0 | 0 | 0 |" in text
    assert "| capture | all text | 3 | 2 (66.7%) | 0 | 1 | 0 | 0 | 0 | 0 | 1 |" in text
    assert "| x-cpu | all text | 2 | 1 (50.0%) | 0 | 1 | 0 | 0 | 0 | 0 | 0 |" in text
    assert "| causal:b | refused: no   way | the same |" in text
    assert "| causal:d | exact | not run |" in text
    assert "Exact in every stage, causal: a." in text


def test_rows_of_another_file_are_taken(tmp_path: Path) -> None:
    here, other = tmp_path / "here.json", tmp_path / "other.json"
    here.write_text(
        json.dumps({"stages": {"capture": {"causal:b": {"outcome": "hung"}, "causal:c": {"outcome": "exact"}}}})
    )
    other.write_text(json.dumps({"stages": {"capture": {"causal:b": {"outcome": "exact"}}, "x": {"causal:a": {}}}}))
    zoo.Results(here).merge(zoo.Results(other))
    stages = json.loads(here.read_text())["stages"]
    assert stages["capture"] == {"causal:b": {"outcome": "exact"}, "causal:c": {"outcome": "exact"}}
    assert stages["x"] == {"causal:a": {}}


@pytest.mark.parametrize(
    ("name", "architecture"), [("llama", "LlamaForCausalLM"), ("deepseek_v3", "DeepseekV3ForCausalLM")]
)
def test_models_are_tiny(name: str, architecture: str) -> None:
    model = build(Kind("causal", name, architecture))
    assert sum(weight.numel() for weight in model.parameters()) < 1_000_000


def test_each_child_has_cores_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    import torch

    found = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(2, 34)))
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: found.append(list(cores)))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: found.append(count))
    for slot, jobs in ((0, 15), (14, 15), (31, 64), (40, 64)):
        zoo._keep_to_own_cores(slot, jobs)
    assert found == [[2, 3], 2, [30, 31], 2, [33], 1, [10], 1]


def test_older_rows_are_made_again_and_quick_ones_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {
        "causal:slow": {"outcome": "exact", "seconds": 9.0, "date": "2026-11-30"},
        "causal:quick": {"outcome": "exact", "seconds": 2.0},
        "causal:fresh": {"outcome": "exact", "seconds": 1.0, "date": "2026-12-01"},
        "causal:again": {"outcome": "hung", "seconds": 3.0, "date": "2026-12-01"},
    }
    file = tmp_path / "rows.json"
    file.write_text(json.dumps({"stages": {"capture": rows}}))
    monkeypatch.setattr(zoo, "other_kinds", lambda: [])
    monkeypatch.setattr(zoo, "kinds", lambda: [Kind("causal", name[7:], "Any") for name in [*rows, "causal:new"]])
    flags = ["--before", "2026-12-01", "--quick-first", "--again", "hung"]
    left = zoo._left(zoo._parser().parse_args(flags), zoo.Results(file))
    assert [kind.type for kind, _ in left] == ["new", "quick", "again", "slow"]
