"""What errors say, of all of them: docs/errors.md is current, and each raise says what, where or why, and a remedy."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest
from conftest import ROOT

from optc.cli.error_table import classes, error_table
from optc.compiler.diagnostics import OptcError

FOLDERS = ("compiler", "passes", "exporters", "runtime", "targets", "training", "src/optc/cli")
NAMES = {cls.__name__ for cls in classes()}


def raised() -> Iterator[tuple[str, ast.Call]]:
    """(file:line, call) of every error that is made in the library."""
    places = [ROOT / name for name in FOLDERS]
    paths = [path for place in places for path in sorted(place.rglob("*.py"))]
    for path in [*paths, *sorted((ROOT / "src" / "optc").glob("*.py"))]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in NAMES:
                yield f"{path.relative_to(ROOT)}:{node.lineno}", node


CALLS = list(raised())


def test_the_table_is_current() -> None:
    assert (ROOT / "docs" / "errors.md").read_text() == error_table(), "python -m optc.cli.error_table docs/errors.md"


def test_every_error_has_a_remedy() -> None:
    assert len(CALLS) > 400
    assert [place for place, call in CALLS if not {"remedy", None} & {item.arg for item in call.keywords}] == []


def test_every_error_names_its_place_or_cause() -> None:
    """By `where` or `why`, or by naming in the first sentence what it is about."""

    def names(call: ast.Call) -> bool:
        given = {item.arg for item in call.keywords} & {"where", "why", None}
        return bool(given) or not call.args or not isinstance(call.args[0], ast.Constant)

    vague = [place for place, call in CALLS if not names(call) and len(str(call.args[0].value).split()) < 3]
    assert vague == []


@pytest.mark.parametrize("cls", classes(), ids=lambda cls: cls.__name__)
def test_every_class(cls: type[OptcError]) -> None:
    error = cls("what went wrong", where="a place", why="a cause", remedy="a remedy")
    assert str(error).splitlines() == ["what went wrong", "  where: a place", "  cause: a cause", "  remedy: a remedy"]
    assert 1 <= cls.exit_code <= 8
    assert cls.__doc__
    assert error.to_dict()["error"] == cls.kind


def test_the_kinds_are_distinct() -> None:
    kinds = [cls.kind for cls in classes()]
    assert len(set(kinds)) == len(kinds)
