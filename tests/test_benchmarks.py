"""Benchmarks are not run by the tests; what they import of optc is there."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest
from conftest import ROOT


def imported(file: Path) -> set[tuple[str, str]]:
    """(module, name) of each import from optc, inside functions too."""
    nodes = ast.walk(ast.parse(file.read_text()))
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("optc")]
    return {(str(node.module), alias.name) for node in froms for alias in node.names}


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda file: file.stem)
def test_imports_resolve(file: Path) -> None:
    for module, name in sorted(imported(file)):
        found = importlib.import_module(module)
        if not hasattr(found, name):
            importlib.import_module(f"{module}.{name}")
