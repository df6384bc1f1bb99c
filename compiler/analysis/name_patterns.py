"""Patterns of weight names, as `--ignore` and `qat.ignore` take them: the whole name, with * and ?."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

from optc.compiler.diagnostics import UsageError


def check_patterns(option: str, patterns: Iterable[str], names: Collection[str]) -> None:
    """Refuse a pattern that matches none of a model's weights: what it was to keep would be changed.

    Args:
        option: where the patterns were given, as errors name it.
        names: all weights of the model.

    Raises:
        UsageError: names the pattern, and one that would match where there is one.
    """
    for pattern in patterns:
        if any(fnmatchcase(name, pattern) for name in names):
            continue
        core = pattern.removeprefix("re:").replace(".*", "*").strip("*^$")
        wider = [item for item in (f"*{core}.weight", f"*{core}*") if any(fnmatchcase(name, item) for name in names)]
        raise UsageError(
            f"{option}: '{pattern}' matches no weight",
            why=f"names look like {', '.join(list(names)[:3])}; a pattern is a whole name, with * and ?",
            remedy=f"use '{wider[0]}'" if core and wider else "correct the pattern, or leave it out",
        )
