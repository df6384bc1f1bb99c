"""Settings of a training that do not go together."""

from __future__ import annotations

from collections.abc import Iterable

from optc.compiler.diagnostics import UsageError


def refuse_beside(key: str, others: Iterable[tuple[bool, str, str]]) -> None:
    """Refuse what does not go with a setting that is on.

    Args:
        key: the setting.
        others: for each other one whether it is on, its name, and why both are too much.

    Raises:
        UsageError: names the first other one that is on.
    """
    for wrong, other, why in others:
        if wrong:
            raise UsageError(f"{other} does not go with {key}", why=why, remedy=f"leave {other} out")
