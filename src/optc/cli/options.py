"""Flags made of the fields of typed structs, and structs made of flags: a command's own, or a request's with a recipe."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import click
import msgspec
from msgspec import Meta

from optc.cli.common import F
from optc.compiler.diagnostics import UsageError
from optc.compiler.settings.fields import Field, Given, fields_of, read_fields
from optc.recipes import read_recipe
from optc.request import SECTIONS, Request, known_keys, make_request, target_fields
from optc.targets.registry import find_target

TARGET_HELP = "Where the model will run; see optc targets."
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


def request_flags(
    sections: Iterable[str], *, target: str | None = None, leave_out: Iterable[str] = ()
) -> Callable[[F], F]:
    """Add to a command the flags of sections of a request, and of targets' own options.

    Args:
        target: the only target of the command; None offers --target and the options of all.
        leave_out: fields of the sections that the command has no use for.
    """
    flags = [click.option("--target", help=TARGET_HELP)] if target is None else []
    for section in sections:
        fields = fields_of(SECTIONS[section])
        flags += [flag(field) for name, field in fields.items() if name not in set(leave_out)]
    flags += _target_flags(target)
    flags.append(
        click.option(
            "--recipe",
            type=click.Path(path_type=Path, dir_okay=False),
            help="YAML file of the flags of optc compile; flags on the command line win.",
        )
    )

    return functools.partial(add_flags, flags=flags)


def flag(field: Field, text: str | None = None) -> Any:
    """The click option of a field. Values stay text: `Field.read` checks those of recipes in the same way.

    Args:
        text: the help, where it is not the field's own with its default.
    """
    default = f"  [default: {field.default_text}]" if field.default_text else ""
    text = field.help + default if text is None else text
    names = [item for item in (field.extra.get("short"), f"--{field.key}") if item]
    if field.kind is bool:
        negation = field.extra.get("negation")
        if negation:
            return click.option(f"--{field.key}/--{negation}", field.name, default=None, help=text)
        return click.option(*names, field.name, is_flag=True, default=None, help=text)
    metavar = field.extra.get("metavar") or "|".join(field.choices) or _METAVARS.get(field.kind, "TEXT")
    return click.option(
        *names,
        field.name,
        metavar=metavar,
        multiple=field.repeatable and not field.extra.get("joined"),
        required=field.required,
        help=text,
    )


def option_help(rows: Iterable[tuple[Any, Field]]) -> str:
    """The help of an option that several targets may have: (target, its field) for each."""
    names: dict[str, list[str]] = {}
    for target, field in rows:
        default = f" (default: {field.default_text})" if field.default_text else ""
        names.setdefault(field.help.rstrip(".") + default, []).append(target.name)
    return " ".join(f"{', '.join(targets)}: {text}." for text, targets in names.items())


def _target_flags(target: str | None) -> list[Any]:
    if target is not None:
        return [flag(field) for field in fields_of(find_target(target).options).values()]
    return [flag(rows[0][1], option_help(rows)) for rows in target_fields().values()]


def given_flags(flags: Mapping[str, Any]) -> dict[str, Given]:
    """The flags that were given, by name."""
    return {
        name: Given(
            value=value, where=f"the command line, --{name.replace('_', '-')}", text=not isinstance(value, bool)
        )
        for name, value in flags.items()
        if value is not None and value != ()
    }


def merge_recipe(flags: dict[str, Any]) -> dict[str, Given]:
    """Flags given on the command line over the recipe's keys; what neither gives is absent."""
    recipe = flags.pop("recipe", None)
    return (read_recipe(recipe, (*known_keys(), "model")) if recipe else {}) | given_flags(flags)


def request_of(merged: dict[str, Given], target: str) -> Request:
    """The request for a target, of merged flags that may name a model too."""
    return make_request(target, {key: value for key, value in merged.items() if key not in ("model", "target")})


def require(merged: dict[str, Given], key: str, example: str) -> str:
    """A text that must come from a flag or the recipe.

    Raises:
        UsageError: it is absent, or no text.
    """
    found = merged.get(key)
    if found is None or found.value in ("", ()):
        raise UsageError(f"no {key} given", remedy=example)
    if not isinstance(found.value, str) or "\0" in found.value:
        raise UsageError(f"'{key}' cannot be {found.value!r}", where=found.where, remedy=f"give text: {example}")
    return found.value
