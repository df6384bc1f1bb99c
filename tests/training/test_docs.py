"""docs/train.md lists every key of a recipe, from the fields."""

from __future__ import annotations

import pytest
from conftest import ROOT

from optc.cli.flag_tables import with_tables
from optc.training.recipe import FIELDS, RECIPES

TEXT = (ROOT / "docs" / "train.md").read_text(encoding="utf-8")


def test_the_table_of_keys_is_current() -> None:
    """`python -m optc.cli.flag_tables docs/train.md` writes it."""
    assert "<!-- table: training-keys -->" in TEXT
    assert with_tables(TEXT) == TEXT


@pytest.mark.parametrize("key", FIELDS)
def test_each_key_has_help(key: str) -> None:
    assert FIELDS[key].help.endswith(".")
    assert f"| `{key}` | " in TEXT


@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_is_documented(name: str) -> None:
    assert f"| `{name}` |" in TEXT
