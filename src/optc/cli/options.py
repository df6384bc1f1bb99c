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


class GroupedOption(click.Option):
    """An option that help shows under a title; "" is that of the options which all commands have."""

    def __init__(self, *args: Any, group: str = "", **given: Any) -> None:
        super().__init__(*args, **given)
        self.group = group


class GroupedCommand(click.Command):
    """A command whose help has a section for each group of options, in the order in which the groups appear."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {"": []}
        for option in self.get_params(ctx):
            row = option.get_help_record(ctx)
            if row is not None and isinstance(option, click.Option):
                groups.setdefault(getattr(option, "group", ""), []).append(row)
        for title, rows in groups.items():
            with formatter.section(title or "Options"):
                formatter.write_dl(rows)


def flag(field: Field, text: str | None = None, choices: Iterable[str] = (), group: str = "") -> Any:
    """The click option of a field. Values stay text: `Field.read` checks those of recipes in the same way.

    Args:
        text: the help, where it is not the field's own with its default.
        choices: all that the flag takes, where that is not what the field takes.
        group: title of the section of help, see `GroupedCommand`.
    """
    default = f"  [default: {field.default_text}]" if field.default_text else ""
    text = field.help + default if text is None else text
    names = [item for item in (field.extra.get("short"), f"--{field.key}") if item]
    if field.kind is bool:
        negation = field.extra.get("negation")
        if negation:
            names = [f"--{field.key}/--{negation}"]
            return click.option(*names, field.name, default=None, help=text, cls=GroupedOption, group=group)
        return click.option(*names, field.name, is_flag=True, default=None, help=text, cls=GroupedOption, group=group)
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
        cls=GroupedOption,
        group=group,
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
