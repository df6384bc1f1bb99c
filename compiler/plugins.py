"""What other packages register by entry points."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import metadata
from typing import TypeVar

from optc.compiler.diagnostics import UsageError, foreign_errors

T = TypeVar("T")


def plugins(group: str, wanted: str, take: Callable[[object], T | None]) -> Iterator[T]:
    """What `take` makes of the value of each entry point of a group; None says that it is something else.

    Args:
        wanted: what the group holds, for the error: "a pass or a module of passes".

    Raises:
        UsageError: a value cannot be imported, or is something else; names the entry point.
    """
    for entry in metadata.entry_points(group=group):
        broken = _useless(entry, "of another package cannot be imported")
        with foreign_errors(broken.what, where=str(broken.where), remedy=broken.remedy, kind=UsageError):
            found = take(entry.load())
        if found is None:
            raise _useless(entry, f"is not {wanted}")
        yield found


def _useless(entry: metadata.EntryPoint, problem: str, why: str | None = None) -> UsageError:
    return UsageError(
        f"the entry point '{entry.name}' {problem}",
        where=f"{entry.group}: {entry.name} = {entry.value}",
        why=why,
        remedy="repair or uninstall the package that registers it",
    )
