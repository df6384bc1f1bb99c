"""The zoo's tables in docs/models.md are what its results say; its sizes are small, and its children are contained."""

from __future__ import annotations

import json
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import zoo_table
from zoo_models import Kind, build

_RESULTS = ROOT / "benchmarks" / "results" / "zoo.json"
_DOCS = ROOT / "docs" / "models.md"


def test_docs_say_what_the_results_say() -> None:
    """`python benchmarks/zoo.py --docs` writes them."""
    assert zoo_table.section(json.loads(_RESULTS.read_text())) in _DOCS.read_text()


def test_nothing_is_wrong_crashed_or_hung() -> None:
    rows = [row for stage in json.loads(_RESULTS.read_text())["stages"].values() for row in stage.values()]
    assert {row["outcome"] for row in rows} <= {"exact", "refused", "not built"}


def test_counts_and_reasons() -> None:
    rows = {
        "causal:a": {"outcome": "exact"},
        "causal:b": {"outcome": "refused", "reason": "no | way"},
        "masked:c": {"outcome": "not built"},
    }
    text = zoo_table.section({"transformers": "1", "torch": "2", "stages": {"capture": rows}})
    assert "| capture | causal | 2 | 1 | 1 | 0 | 0 | 0 | 0 | 0 |" in text
    assert "| capture | all | 2 | 1 | 1 | 0 | 0 | 0 | 0 | 1 |" in text
    assert "| refused | no   way | causal:b |" in text
    assert "Exact, causal: a." in text


@pytest.mark.parametrize(
    ("name", "architecture"), [("llama", "LlamaForCausalLM"), ("deepseek_v3", "DeepseekV3ForCausalLM")]
)
def test_models_are_tiny(name: str, architecture: str) -> None:
    model = build(Kind("causal", name, architecture))
    assert sum(weight.numel() for weight in model.parameters()) < 1_000_000
