"""What every command shares: --json, progress on stderr, and how results and errors are printed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from optc.compiler.diagnostics import OptcError, ResourceError, ran_out_of_memory

F = TypeVar("F", bound=Callable[..., Any])

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")


def stderr() -> Console:
    """The console for progress and remarks; stdout is for results."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def emit(result: dict[str, Any], as_json: bool, show: Callable[[dict[str, Any]], None]) -> None:
    """Print a result: as one JSON object, or by `show` for people."""
    if as_json:
        click.echo(json.dumps(result, indent=2, ensure_ascii=False))
    else:
        show(result)


@contextmanager
def progress(title: str, total: int | None = None) -> Iterator[Callable[[int, str], None]]:
    """A progress bar on stderr, silent when stderr is not a terminal.

    Yields `update(done, note)`: the number of finished steps and what is going on.
    """
    console = stderr()
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(title, total=total, note="")

        def update(done: int, note: str = "") -> None:
            bar.update(task, completed=done, note=note)

        yield update


def fail(error: OptcError, as_json: bool) -> int:
    """Print an error to stderr (with --json also as an object on stdout); returns the exit code."""
    if as_json:
        click.echo(json.dumps(error.to_dict(), indent=2))
    stderr().print(f"[bold red]error[/] ({error.kind}): ", end="")
    click.echo(str(error), err=True)
    return error.exit_code


def guarded(action: Callable[[], Any], *, as_json: bool) -> int:
    """Run a command body; OptcErrors and exhausted memory become messages and exit codes."""
    try:
        action()
    except OptcError as error:
        return fail(error, as_json)
    except (MemoryError, RuntimeError) as error:
        if not ran_out_of_memory(error):
            raise
        why = str(error).partition("\n")[0] or None
        return fail(ResourceError("out of memory", why=why, remedy="use a smaller model or a larger machine"), as_json)
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    return 0
