"""Trees of files and how deep they go."""

from __future__ import annotations

from typing import Any

import pytest

from optc.compiler.nesting import DEEPEST, check_nesting


@pytest.mark.parametrize("wrap", [lambda value: [value], lambda value: {"a": value}, lambda value: [0, {"x": value}]])
def test_the_deepest_that_is_taken(wrap: Any) -> None:
    tree: Any = 1
    levels = DEEPEST // (2 if len(wrap(1)) == 2 else 1)
    for _ in range(levels):
        tree = wrap(tree)
    check_nesting(tree)
    for deeper in (1, 5000):  # the latter is beyond Python's stack
        for _ in range(deeper):
            tree = wrap(tree)
        with pytest.raises(ValueError, match="nested more than 64 levels deep"):
            check_nesting(tree)


def test_width_is_no_depth() -> None:
    check_nesting({"a": [[1] * 100] * 100, "b": "x" * 1000})
