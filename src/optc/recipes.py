"""Recipes: the flags of `optc compile` in a YAML file, and the steps of a pipeline by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from optc.compiler.diagnostics import UsageError, unknown_name
from optc.compiler.rewriting.passes import Pass
from optc.compiler.settings.fields import Given, unknown_key
from optc.compiler.settings.yaml_mapping import parse_setting, read_mapping
from optc.compiler.target.options import QuantRequest
from optc.compiler.target.target import Step
from optc.passes.registry import find_pass


def read_recipe(path: Path, known: Iterable[str]) -> dict[str, Given]:
    """Read a YAML recipe; its keys are the flags of `optc compile` (hyphen or underscore). Empty values are left out.

    Raises:
        InputError: unreadable file or not a mapping.
        UsageError: a key that is no flag, with the nearest name.
    """
    names = set(known)
    out = {}
    for key, value in read_mapping(path).items():
        name = key.replace("-", "_")
        if name not in names:
            raise unknown_key(key, (item.replace("_", "-") for item in names), str(path))
        if value is not None:
            out[name] = Given(value=value, where=f"{path}, key '{key}'")
    return out


def make_pass(name: str, options: Mapping[str, Any] | None = None) -> Pass:
    """A pass by name with options given as plain values.

    Raises:
        UsageError: unknown pass or option, or a value of the wrong type.
    """
    cls = find_pass(name)
    fields = {field.name for field in dataclasses.fields(cls)}
    given = {key.replace("-", "_"): value for key, value in (options or {}).items()}
    for key in given:
        if key not in fields:
            raise unknown_name(f"option of pass '{cls.name}'", key, fields)
    try:
        return msgspec.convert(given, cls, strict=False)
    except msgspec.ValidationError as error:
        raise UsageError(f"invalid option of pass '{cls.name}'", why=str(error), remedy="see optc passes") from error


def parse_passes(items: Sequence[str | Mapping[str, Any]], asked: QuantRequest) -> list[Step]:
    """Requested passes: names, or one-key mappings name -> options as YAML has them.

    Quantization passes that give no options of their own take the flags (`--bits` and so on).
    """
    steps = []
    for item in items:
        name, given = (item, {}) if isinstance(item, str) else next(iter(item.items()))
        cls = find_pass(str(name))
        own = {str(key).replace("-", "_"): value for key, value in (given or {}).items()}
        merged = {**flags_for(cls, asked), **own} if cls.lossy else own
        steps.append(Step(make_pass(str(name), merged)))
    return steps


def flags_for(cls: type[Pass], asked: QuantRequest) -> dict[str, Any]:
    """The flags of quantization that were given and that a pass has fields for."""
    fields = {field.name for field in dataclasses.fields(cls)}
    given = msgspec.structs.asdict(asked)
    return {key: value for key, value in given.items() if key in fields and value not in (None, ())}


def apply_pass_options(steps: Sequence[Step], settings: Sequence[str]) -> list[Step]:
    """Apply `NAME.OPTION=VALUE` settings to the steps of a recipe.

    Raises:
        UsageError: malformed setting, or a pass that the recipe does not have.
    """
    out = list(steps)
    for setting in settings:
        path, value = parse_setting("--pass-option", setting, "NAME.OPTION=VALUE")
        name, dot, option = path.partition(".")
        if not dot:
            raise UsageError(f"cannot read --pass-option '{setting}'", remedy="write NAME.OPTION=VALUE")
        cls = find_pass(name)
        places = [i for i, step in enumerate(out) if type(step.rewrite) is cls]
        if not places:
            raise unknown_name("pass of this recipe", name, [step.rewrite.name for step in out])
        for i in places:
            merged = {**out[i].rewrite.options(), option.replace("-", "_"): value}
            out[i] = dataclasses.replace(out[i], rewrite=make_pass(cls.name, merged))
    return out
