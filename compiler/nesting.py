"""How deep trees from files may be nested: what is far below every stack, so that code may walk them by recursion."""

from __future__ import annotations

from typing import Any

DEEPEST = 64


def check_nesting(tree: Any) -> None:
    """Refuse a tree of JSON that is nested deeper than anything that optc writes.

    A parser in C takes thousands of levels where Python's own stack ends at one thousand, and how many of these are left
    depends on the caller.

    Raises:
        ValueError: objects and lists in more than `DEEPEST` levels.
    """
    level = [tree]
    for _ in range(DEEPEST + 1):
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner += value.values()
            elif isinstance(value, list | tuple):
                inner += value
        if not inner:
            return
        level = inner
    raise ValueError(f"it is nested more than {DEEPEST} levels deep")
