"""What every command shares: --json, progress on stderr, and how results and errors are printed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from optc.cli.bug_report import bug_error
from optc.compiler.diagnostics import (
    LEAVES,
    InputError,
    OptcError,
    described,
    os_failure,
    out_of_memory,
    printable,
    ran_out_of_memory,
)
from optc.compiler.files import read_plain

if TYPE_CHECKING:
    from rich.console import Console

F = TypeVar("F", bound=Callable[..., Any])

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")


def stderr(least: int = 0) -> Console:
    """The console for progress and remarks; stdout is for results.

    Args:
        least: columns that it has at least; a narrower terminal wraps its lines.
    """
    from rich.console import Console

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    if console.width < least:
        console.width = least
    return console


def say(text: str = "", *, nl: bool = True, err: bool = False, **style: Any) -> None:
    """Print text as a terminal may show it: what comes from files may hold control characters. `style` as click's."""
    click.secho(printable(text), nl=nl, err=err, **style)


def json_text(value: Any) -> str:
    """Indented JSON in which nothing but letters and signs stands for itself."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    return text if printable(text) == text else json.dumps(value, indent=2)


def emit(result: dict[str, Any], as_json: bool, show: Callable[[dict[str, Any]], None]) -> None:
    """Print a result: as one JSON object, or by `show` for people."""
    if as_json:
        click.echo(json_text(result))
    else:
        show(result)


def read_text(path: Path) -> str:
    """A text file.

    Raises:
        InputError: it cannot be read, or is not UTF-8.
    """
    data = read_plain(path, "reading the text")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError("the text is not UTF-8", where=str(path), why=str(error), remedy="convert it first") from error


def fail(error: OptcError, as_json: bool) -> int:
    """Print an error to stderr (with --json also as an object on stdout); returns the exit code."""
    if as_json:
        click.echo(json.dumps(error.to_dict(), indent=2))
    stderr().print(f"[bold red]error[/] ({error.kind}): ", end="")
    click.echo(str(error), err=True)
    return error.exit_code


def guarded(action: Callable[[], Any], *, as_json: bool) -> int:
    """Run a command body; whatever it raises becomes a message and an exit code, an unknown error 1 with a report."""
    try:
        action()
    except OptcError as error:
        return fail(error, as_json)
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    except LEAVES:
        raise
    except BaseException as error:  # noqa: BLE001 (a panic of a library in Rust is no Exception; all is told)
        return fail(of_the_system(error) or bug_error(error), as_json)
    return 0


def of_the_system(error: BaseException) -> OptcError | None:
    """The typed error for what the system refused to a command; None where it is a bug."""
    if isinstance(error, OSError):
        return os_failure(error, "running the command")
    if ran_out_of_memory(error):
        return out_of_memory("running the command", why=described(error))
    return None
