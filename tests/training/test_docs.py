"""docs/train.md lists every key of a recipe with its default."""

from __future__ import annotations

import re

import pytest
from conftest import ROOT

from optc.training.config import TrainConfig
from optc.training.recipe import RECIPES, dotted_keys

TEXT = (ROOT / "docs" / "train.md").read_text()


@pytest.mark.parametrize("key", dotted_keys(TrainConfig))
def test_each_key_is_documented(key: str) -> None:
    assert re.search(rf"^\|.*`{re.escape(key)}`", TEXT, re.MULTILINE), f"{key} is not in the table of docs/train.md"


def test_no_key_is_documented_that_is_not_there() -> None:
    table = TEXT.split("## Keys")[1].split("## Batches")[0]
    named = {
        key
        for row in table.splitlines()
        if row.startswith("| `")
        for key in re.findall(r"`([^`]+)`", row.split("|")[1])
    }
    assert named == set(dotted_keys(TrainConfig))


@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_is_documented(name: str) -> None:
    assert f"| `{name}` |" in TEXT
