"""Progress of long work on stderr: a bar, lines where there is no terminal, an element that changes in a notebook."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from html import escape
from typing import Any

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from optc.compiler.diagnostics import UsageError, printable
from optc.heartbeat import heartbeat

Told = Callable[[int, str], None]
"""Gets (finished steps, what goes on)."""

Update = Callable[..., None]
"""`update(done, note="", total=None)`: the number of finished steps, what goes on, and of how many steps."""

Display = tuple[Update, Callable[[str, int | None], AbstractContextManager[Update]]]
"""What is shown of a command: its update, and what opens a part of it by title and number of steps."""

_shown: ContextVar[Display | None] = ContextVar("shown", default=None)
"""The display of the command that runs."""


@contextmanager
def progress(title: str, total: int | None = None) -> Iterator[Update]:
    """A progress bar on stderr; without a terminal a line at the start, every ten seconds and at the end.

    It is for a whole command: open it before what takes long is imported. Yields its update.
    """
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with _bars(console, title, total) if console.is_terminal else _lines(title) as display, _within(display):
        yield display[0]


@contextmanager
def part(title: str, total: int | None = None) -> Iterator[Update]:
    """A part of what a command does, shown where the command is: yields its update, which without a display does nothing."""
    display = _shown.get()
    if display is None:
        yield lambda done, note="", total=None: None
        return
    with display[1](title, total) as update:
        yield update


@contextmanager
def _within(display: Display) -> Iterator[None]:
    token = _shown.set(display)
    try:
        yield
    finally:
        _shown.reset(token)


@contextmanager
def _lines(title: str) -> Iterator[Display]:
    with heartbeat(title, lambda line: click.echo(printable(line), err=True)) as tell:

        @contextmanager
        def opened(title: str, total: int | None) -> Iterator[Update]:
            tell(title)
            yield lambda done, note="", total=None: tell(f"{title}: {note}" if note else title)
            tell("")

        yield lambda done, note="", total=None: tell(note), opened


@contextmanager
def _bars(console: Console, title: str, total: int | None) -> Iterator[Display]:
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:

        def updating(task: TaskID) -> Update:
            def update(done: int, note: str = "", total: int | None = None) -> None:
                bar.update(task, completed=done, note=note, total=total)

            return update

        @contextmanager
        def opened(title: str, total: int | None) -> Iterator[Update]:
            task = bar.add_task(title, total=total, note="")
            yield updating(task)
            bar.remove_task(task)

        yield updating(bar.add_task(title, total=total, note="")), opened


@contextmanager
def reporting(given: Told | bool | None, title: str, total: Callable[[], int | None]) -> Iterator[Update | None]:
    """What `progress=` of a call from Python stands for: a function as it is, True for a bar, False and None for silence.

    Args:
        total: gives the number of steps, or None where nobody knows it yet; asked for a bar alone.

    Raises:
        UsageError: it is something else.
    """
    if given is None or given is False:
        yield None
    elif given is True:
        with notebook_bar(title, total()) if in_notebook() else progress(title, total()) as update:
            yield update
    elif callable(given):
        yield given
    else:
        raise UsageError(f"progress cannot be {given!r}", remedy="give True, or a function of (finished steps, note)")


def in_notebook() -> bool:
    """Whether a kernel of Jupyter runs this process."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")


class Bar:
    """A bar for notebooks, as HTML and as text."""

    def __init__(self, title: str, total: int | None) -> None:
        self.title, self.total = title, total
        self.done, self.note, self.begin = 0, "", time.monotonic()

    def _words(self) -> str:
        of = "" if self.total is None else f"/{self.total}"
        note = f", {self.note}" if self.note else ""
        return printable(f"{self.done}{of} [{time.monotonic() - self.begin:.0f} s{note}]")

    def __repr__(self) -> str:
        share = min(1.0, self.done / self.total) if self.total else 0.0
        return f"{self.title}: {share:4.0%}|{'#' * round(20 * share):20}| {self._words()}"

    def _repr_html_(self) -> str:
        most = "" if self.total is None else f" value='{self.done}' max='{self.total}'"
        return f"<div>{escape(self.title)} <progress{most}></progress> {escape(self._words())}</div>"


_OFTEN = 0.2
"""Seconds between two pictures of a notebook's bar, at least."""


@contextmanager
def notebook_bar(title: str, total: int | None) -> Iterator[Update]:
    """A bar below the cell of a notebook; yields its update, as `progress` does."""
    display: Any = sys.modules["IPython"].display.display
    bar, shown = Bar(title, total), time.monotonic()
    handle = display(bar, display_id=True)

    def update(done: int, note: str = "", total: int | None = None) -> None:
        nonlocal shown
        bar.done, bar.note = done, note
        bar.total = bar.total if total is None else total
        if time.monotonic() - shown >= _OFTEN:
            shown = time.monotonic()
            handle.update(bar)

    @contextmanager
    def opened(title: str, total: int | None) -> Iterator[Update]:
        bar.total = total
        yield lambda done, note="", total=None: update(done, f"{title}: {note}" if note else title, total)

    try:
        with _within((update, opened)):
            yield update
        bar.done, bar.note = bar.total or bar.done, "done"
    finally:
        handle.update(bar)
