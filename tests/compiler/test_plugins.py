"""Entry points of other packages, and what is said of those that are no use."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from optc.compiler import plugins as module
from optc.compiler.diagnostics import UsageError
from optc.compiler.plugins import plugins


def found(monkeypatch: pytest.MonkeyPatch, value: str) -> list[float]:
    entry = EntryPoint(name="mine", value=value, group="optc.numbers")
    monkeypatch.setattr(module.metadata, "entry_points", lambda group: [entry] if group == "optc.numbers" else [])
    return list(plugins("optc.numbers", "a number", lambda item: item if isinstance(item, float) else None))


@pytest.mark.parametrize("text", ["raise RuntimeError('no')", "def", "1 / 0"])
def test_a_package_that_fails_is_no_bug(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fails_at_once.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match="'mine' of another package cannot be imported") as caught:
        found(monkeypatch, "fails_at_once")
    assert "Error" in str(caught.value.why)


def test_what_another_package_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found(monkeypatch, "math:tau") == [6.283185307179586]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("math:none", "the entry point 'mine' of another package cannot be imported"),
        ("no_module_of_this_name", "the entry point 'mine' of another package cannot be imported"),
        ("math", "the entry point 'mine' is not a number"),
    ],
)
def test_what_is_of_no_use_is_named(monkeypatch: pytest.MonkeyPatch, value: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        found(monkeypatch, value)
    assert caught.value.what == message
    assert caught.value.where == f"optc.numbers: mine = {value}"
    assert caught.value.remedy == "repair or uninstall the package that registers it"
