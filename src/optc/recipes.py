"""Recipes: the flags of `optc compile` in a YAML file, and the steps of a pipeline by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import yaml

from optc.compiler.diagnostics import InputError, UsageError, unknown_name
from optc.compiler.rewriting.passes import Pass
from optc.compiler.target.target import CompileOptions, Step
from optc.passes.registry import find_pass


def read_recipe(path: Path, known: Sequence[str]) -> dict[str, Any]:
    """Read a YAML recipe; its keys are the flags of `optc compile` (hyphen or underscore).

    Raises:
        InputError: unreadable file or not a mapping.
        UsageError: a key that is no flag, with the nearest name.
    """
    try:
        data = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(
            "the recipe cannot be read", where=str(path), why=str(error), remedy="give a YAML file of flags"
        ) from error
    if not isinstance(data, dict):
        raise InputError("the recipe is not a mapping", where=str(path), remedy="write `key: value` lines")
    out = {}
    for key, value in data.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise unknown_name("recipe key", str(key), [item.replace("_", "-") for item in known])
        out[name] = value
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
        raise UsageError(
            f"bad option of pass '{cls.name}'", why=str(error), remedy="see optc passes"
        ) from error


def parse_passes(items: Sequence[str | Mapping[str, Any]], options: CompileOptions) -> list[Step]:
    """Requested passes: names, or one-key mappings name -> options as YAML has them.

    Quantization passes that give no options of their own take the flags (`--bits` and so on).
    """
    steps = []
    for item in items:
        name, given = (item, {}) if isinstance(item, str) else next(iter(item.items()))
        cls = find_pass(str(name))
        merged = {**flags_for(cls, options), **(given or {})} if cls.lossy else dict(given or {})
        steps.append(Step(make_pass(str(name), merged)))
    return steps


def flags_for(cls: type[Pass], options: CompileOptions) -> dict[str, Any]:
    """The compile flags that a pass has fields for."""
    fields = {field.name for field in dataclasses.fields(cls)}
    return {
        key: value
        for key, value in dataclasses.asdict(options).items()
        if key in fields and value is not None
    }


def apply_pass_options(steps: Sequence[Step], settings: Sequence[str]) -> list[Step]:
    """Apply `NAME.OPTION=VALUE` settings to the steps of a recipe.

    Raises:
        UsageError: malformed setting, or a pass that the recipe does not have.
    """
    out = list(steps)
    for setting in settings:
        path, equals, text = setting.partition("=")
        name, dot, option = path.partition(".")
        if not (equals and dot):
            raise UsageError(f"cannot read --pass-option '{setting}'", remedy="write NAME.OPTION=VALUE")
        cls = find_pass(name)
        places = [i for i, step in enumerate(out) if type(step.rewrite) is cls]
        if not places:
            raise unknown_name("pass of this recipe", name, [step.rewrite.name for step in out])
        for i in places:
            merged = {**out[i].rewrite.options(), option.replace("-", "_"): yaml.safe_load(text)}
            out[i] = dataclasses.replace(out[i], rewrite=make_pass(cls.name, merged))
    return out
