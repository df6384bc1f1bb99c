"""The flags of a request: of its sections and of targets' own options, with a recipe under them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import click

from optc.cli.common import F
from optc.cli.options import GroupedOption, add_flags, completion, flag, given_flags
from optc.compiler.diagnostics import UsageError
from optc.compiler.settings.fields import Field, Given, fields_of, shown
from optc.request import SECTIONS, Request, known_keys, make_request, target_fields
from optc.targets.registry import target_options

TARGET_HELP = "Where the model will run; see optc targets."

TITLES = {
    "what": "What is compiled",
    "quantization": "Quantization",
    "cache": "KV cache",
    "drafting": "Speculative decoding",
    "calibration": "Calibration",
    "gate": "Numerics gate",
    "run": "Output",
}
"""Sections of a request as help names them."""
_OF_TARGETS = "Options of targets"


def request_flags(
    sections: Iterable[str], *, target: str | None = None, leave_out: Iterable[str] = ()
) -> Callable[[F], F]:
    """Add to a command the flags of sections of a request, and of targets' own options.

    Args:
        target: the only target of the command; None offers --target and the options of all.
        leave_out: fields of the sections that the command has no use for.
    """
    proposed = completion(target_options)
    flags = [click.option("--target", help=TARGET_HELP, shell_complete=proposed)] if target is None else []
    for section in sections:
        fields = fields_of(SECTIONS[section])
        chosen = {name: field for name, field in fields.items() if name not in set(leave_out)}
        flags += [_flag(name, field, TITLES[section]) for name, field in chosen.items()]
    flags += _target_flags(target)
    flags.append(
        click.option(
            "--recipe",
            type=click.Path(path_type=Path, dir_okay=False),
            help="YAML file of the flags of optc compile; flags on the command line win.",
        )
    )

    return functools.partial(add_flags, flags=flags)


def _flag(name: str, field: Field, group: str) -> Any:
    if name != "quant":
        return flag(field, group=group)
    given: dict[str, Any] = {"cls": GroupedOption, "group": group, "shell_complete": completion(_methods)}
    return click.option("--quant", "quant", metavar="TEXT", help=field.help, **given)


def _methods() -> Iterable[str]:
    """Names of quantization methods; reading them imports torch, a second or two of a shell's wait."""
    from optc.targets.methods import METHODS

    return METHODS


def option_help(rows: Iterable[tuple[str, Field]]) -> str:
    """The help of an option that several targets may have: (target's name, its field) for each."""
    names: dict[str, list[str]] = {}
    for target, field in rows:
        default = f" (default: {field.default_text})" if field.default_text else ""
        names.setdefault(field.help.rstrip(".") + default, []).append(target)
    return " ".join(f"{', '.join(targets)}: {text}." for text, targets in names.items())


def _target_flags(target: str | None) -> list[Any]:
    if target is not None:
        return [flag(field, group=_OF_TARGETS) for field in fields_of(target_options()[target]).values()]
    return [flag(rows[0][1], option_help(rows), _choices(rows), _OF_TARGETS) for rows in target_fields().values()]


def _choices(rows: Iterable[tuple[str, Field]]) -> Iterable[str]:
    """What an option takes that several targets have: each target checks its own part of it."""
    return dict.fromkeys(choice for _, field in rows for choice in field.choices)


def merge_recipe(flags: dict[str, Any]) -> dict[str, Given]:
    """Flags given on the command line over the recipe's keys; what neither gives is absent."""
    recipe = flags.pop("recipe", None)
    if not recipe:
        return given_flags(flags)
    from optc.saved_recipes import read_recipe

    return read_recipe(recipe, (*known_keys(), "model")) | given_flags(flags)


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
        raise UsageError(f"'{key}' cannot be {shown(found.value)}", where=found.where, remedy=f"give text: {example}")
    return found.value
