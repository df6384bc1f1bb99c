"""Flags made of the fields of a request, and a request made of flags and a YAML recipe."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from optc.cli.common import F
from optc.compiler.diagnostics import UsageError
from optc.compiler.settings.fields import Field, Given, fields_of
from optc.recipes import read_recipe
from optc.request import SECTIONS, Request, known_keys, make_request, target_fields
from optc.targets.registry import find_target

TARGET_HELP = "Where the model will run; see optc targets."
_METAVARS = {int: "INTEGER", float: "NUMBER", str: "TEXT", Path: "PATH"}


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
        flags += [flag(field, field.help) for name, field in fields.items() if name not in set(leave_out)]
    flags += _target_flags(target)
    flags.append(
        click.option(
            "--recipe",
            type=click.Path(path_type=Path, dir_okay=False),
            help="YAML file of the flags of optc compile; flags on the command line win.",
        )
    )

    def add(command: F) -> F:
        return functools.reduce(lambda made, item: item(made), reversed(flags), command)

    return add


def flag(field: Field, text: str) -> Any:
    """The click option of a field. Values stay text: `Field.read` checks those of recipes in the same way."""
    default = f"  [default: {field.default_text}]" if field.default_text else ""
    names = [item for item in (field.extra.get("short"), f"--{field.key}") if item]
    if field.kind is bool:
        negation = field.extra.get("negation")
        if negation:
            return click.option(f"--{field.key}/--{negation}", field.name, default=None, help=text + default)
        return click.option(*names, field.name, is_flag=True, default=None, help=text)
    metavar = field.extra.get("metavar") or "|".join(field.choices) or _METAVARS.get(field.kind, "TEXT")
    return click.option(
        *names,
        field.name,
        metavar=metavar,
        multiple=field.repeatable and "read" not in field.extra,
        help=text + default,
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
        return [flag(field, field.help) for field in fields_of(find_target(target).options).values()]
    found = []
    for rows in target_fields().values():
        first = rows[0][1]
        option = flag(first, "")
        found.append(_with_help(option, option_help(rows)))
    return found


def _with_help(option: Any, text: str) -> Any:
    def add(command: Any) -> Any:
        made = option(command)
        made.__click_params__[-1].help = text
        return made

    return add


def merge_recipe(flags: dict[str, Any]) -> dict[str, Given]:
    """Flags given on the command line over the recipe's keys; what neither gives is absent."""
    recipe = flags.pop("recipe", None)
    merged = read_recipe(recipe, (*known_keys(), "model")) if recipe else {}
    for key, value in flags.items():
        if value is not None and value != ():
            text = not isinstance(value, bool)
            merged[key] = Given(value=value, where=f"the command line, --{key.replace('_', '-')}", text=text)
    return merged


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
