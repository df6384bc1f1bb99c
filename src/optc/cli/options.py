"""Flags made of the fields of typed structs, and structs made of flags; of a request see `request_flags`.

Nothing here imports torch: an ONNX artifact runs without it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import click
import msgspec
from click.shell_completion import CompletionItem
from msgspec import Meta

from optc.cli.common import F
from optc.compiler.settings.fields import Field, Given, fields_of, read_fields

Settings = Annotated[
    tuple[str, ...],
    Meta(
        description="Set any key of a training recipe (repeatable), e.g. optimizer.lr=3e-4.",
        extra={"metavar": "KEY=VALUE"},
    ),
]
"""The type of a field that sets keys of a training recipe."""

_METAVARS = {int: "INTEGER", float: "NUMBER", str: "TEXT", Path: "PATH"}


def struct_flags(cls: type[msgspec.Struct]) -> Callable[[F], F]:
    """Add to a command the flags of its own struct; the command gets the struct, read and checked, as `options`."""
    fields = fields_of(cls)

    def add(command: F) -> F:
        @functools.wraps(command)
        def called(*args: Any, **flags: Any) -> Any:
            given = given_flags({name: flags.pop(name) for name in fields})
            return command(*args, options=cls(**read_fields(cls, given)), **flags)

        return add_flags(called, (flag(field) for field in fields.values()))  # type: ignore[return-value]

    return add


def add_flags(command: F, flags: Iterable[Callable[[F], F]]) -> F:
    """A command with click options, in this order."""
    return functools.reduce(lambda made, item: item(made), reversed(list(flags)), command)


def flag(field: Field, text: str | None = None, choices: Iterable[str] = ()) -> Any:
    """The click option of a field. Values stay text: `Field.read` checks those of recipes in the same way.

    Args:
        text: the help, where it is not the field's own with its default.
        choices: all that the flag takes, where that is not what the field takes.
    """
    default = f"  [default: {field.default_text}]" if field.default_text else ""
    text = field.help + default if text is None else text
    names = [item for item in (field.extra.get("short"), f"--{field.key}") if item]
    if field.kind is bool:
        negation = field.extra.get("negation")
        if negation:
            return click.option(f"--{field.key}/--{negation}", field.name, default=None, help=text)
        return click.option(*names, field.name, is_flag=True, default=None, help=text)
    metavar = field.extra.get("metavar") or "|".join(choices or field.choices) or _METAVARS.get(field.kind, "TEXT")
    known = tuple(choices) or field.choices
    return click.option(
        *names,
        field.name,
        shell_complete=completion(lambda: known, files=field.kind is Path) if known or field.kind is Path else None,
        metavar=metavar,
        multiple=field.repeatable and not field.extra.get("joined"),
        required=field.required,
        help=text,
    )


def completion(names: Callable[[], Iterable[str]], *, files: bool = False) -> Callable[..., list[CompletionItem]]:
    """What a shell proposes for the value of an option: the names that begin as what was typed, or files."""

    def complete(_context: click.Context, _option: click.Parameter, begun: str) -> list[CompletionItem]:
        if files:
            return [CompletionItem(begun, type="file")]
        return [CompletionItem(name) for name in names() if name.startswith(begun)]

    return complete


def given_flags(flags: Mapping[str, Any]) -> dict[str, Given]:
    """The flags that were given, by name."""
    return {
        name: Given(
            value=value, where=f"the command line, --{name.replace('_', '-')}", text=not isinstance(value, bool)
        )
        for name, value in flags.items()
        if value is not None and value != ()
    }
