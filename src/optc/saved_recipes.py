"""Recipes: the flags of `optc compile` in a YAML file. Written of a compile, what was asked for beyond the defaults."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from optc.compiler.diagnostics import InputError, UsageError, os_errors
from optc.compiler.files import replace_file
from optc.compiler.settings.fields import Field, Given, fields_of, unknown_key
from optc.compiler.settings.yaml_mapping import read_mapping
from optc.request import SECTIONS, Request

_LEFT_OUT = ("force", "save_recipe")
"""What a compile does to files that are there is asked for each time."""


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


def recipe_of(model: Any, request: Request) -> dict[str, Any]:
    """Key -> value of all that differs from its default, as YAML has them.

    Raises:
        UsageError: a model, a pass or tokens in memory, which no recipe can name.
    """
    if not isinstance(model, str | Path):
        raise _unnamed("a model in memory")
    asked = {field.key: plain(value) for field, value in asked_for(request) if field.name not in _LEFT_OUT}
    return {"model": str(model), "target": request.target.name, **asked}


def asked_for(request: Request) -> Iterator[tuple[Field, Any]]:
    """Each field of a request that differs from its default, with its value."""
    parts = [getattr(request, section) for section in SECTIONS]
    for part in [*parts, *([] if request.options is None else [request.options])]:
        defaults = type(part)()
        for name, field in fields_of(type(part)).items():
            value, default = getattr(part, name), getattr(defaults, name)
            if value is not default and not _same(value, default):
                yield field, value


def _same(value: Any, default: Any) -> bool:
    return type(value) is type(default) and bool(value == default)


def plain(value: Any) -> Any:
    """A value of a request as YAML has it.

    Raises:
        UsageError: it has no name there: a pass, tokens in memory.
    """
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise _unnamed(f"a {type(value).__name__}")


def _unnamed(what: str) -> UsageError:
    return UsageError(
        f"a recipe cannot name {what}", remedy="leave save-recipe out, or give folders, files and names of passes"
    )


def check_recipe(path: Path, model: Any, request: Request) -> None:
    """Refuse before the compile what could not be written after it.

    Raises:
        UsageError: see `recipe_of`. InputError: the file exists, and the request does not force.
    """
    recipe_of(model, request)
    if path.exists() and not request.run.force:
        raise InputError("the recipe exists already", where=str(path), remedy="choose another file, or use --force")


def write_recipe(path: Path, model: Any, request: Request) -> None:
    """Write the recipe of a compile that went through.

    Raises:
        InputError, ResourceError: the file cannot be written.
    """
    text = yaml.safe_dump(recipe_of(model, request), sort_keys=False, allow_unicode=True)
    with os_errors("writing the recipe", str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, text.encode())
