"""From a recipe (a YAML file, or one that ships), flags and `--set key=value` to a checked TrainConfig."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import msgspec
import yaml

from optc.compiler.diagnostics import InputError, UsageError, nearest, unknown_name
from optc.training.config import TrainConfig

RECIPES = ("pretrain", "finetune", "lora", "qlora", "qat", "distill")


def load_config(recipe: str, *, values: Mapping[str, Any] | None = None, settings: Sequence[str] = ()) -> TrainConfig:
    """The config of a run: the recipe, then `values` (dotted key -> value), then `settings` (`key=value` texts).

    Args:
        recipe: the name of a recipe that ships, or the path of a YAML file; its key `recipe` names a recipe that
            it changes.

    Raises:
        InputError: the file cannot be read or is not a mapping.
        UsageError: an unknown recipe or key (the nearest name is given), or a value that does not fit.
    """
    tree = _read(recipe)
    for key, value in (values or {}).items():
        _assign(tree, key, value)
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals or not key:
            raise UsageError(f"cannot read --set '{setting}'", remedy="write --set optimizer.lr=3e-4")
        _assign(tree, key.strip(), _parse(setting, text))
    return convert(tree, where=recipe)


def convert(tree: Mapping[str, Any], *, where: str) -> TrainConfig:
    """A mapping as TrainConfig.

    Raises:
        UsageError: unknown key or a value of another type or outside its range.
    """
    _check_keys(tree, TrainConfig, "", where)
    try:
        config = msgspec.convert(tree, TrainConfig, strict=False)
    except msgspec.ValidationError as error:
        reason, _, place = str(error).partition(" - at `$.")
        raise UsageError(
            f"invalid value of '{place.rstrip('`')}'" if place else "an invalid value",
            where=where,
            why=reason,
            remedy="docs/train.md lists every key with its type and default",
        ) from error
    return config


def _read(recipe: str) -> dict[str, Any]:
    if recipe in RECIPES:
        text = (resources.files("optc.training") / "recipes" / f"{recipe}.yaml").read_text()
        return _mapping(text, recipe)
    path = Path(recipe)
    if path.suffix not in (".yaml", ".yml") and not path.exists():
        raise unknown_name("recipe", recipe, RECIPES)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            "the recipe cannot be read", where=str(path), why=str(error), remedy="give a YAML file"
        ) from error
    tree = _mapping(text, str(path))
    base = tree.pop("recipe", None)
    if base is None:
        return tree
    if base not in RECIPES:
        raise unknown_name("recipe", str(base), RECIPES)
    return _merge(_read(base), tree)


def _mapping(text: str, where: str) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError("the recipe is not YAML", where=where, why=str(error)) from error
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise InputError("the recipe is not a mapping", where=where, remedy="write `key: value` lines")
    return tree


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        base[key] = _merge(base[key], value) if both else value
    return base


def _assign(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for name in parents:
        inner = tree.setdefault(name, {})
        if not isinstance(inner, dict):
            raise UsageError(f"'{name}' of '{key}' is not a group of keys", remedy="see docs/train.md")
        tree = inner
    tree[last] = value


def _parse(setting: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UsageError(f"cannot read --set '{setting}'", why=str(error).splitlines()[0]) from error


def _check_keys(tree: Mapping[str, Any], cls: type[msgspec.Struct], prefix: str, where: str) -> None:
    """Refuse a key that the config has no field for, and name the nearest one."""
    hints = typing.get_type_hints(cls)
    for key, value in tree.items():
        if key not in hints:
            known = dotted_keys(TrainConfig)
            close = nearest(f"{prefix}{key}", known) or nearest(key, [name.split(".")[-1] for name in known])
            raise UsageError(
                f"unknown key '{prefix}{key}'",
                where=where,
                remedy=(f"did you mean '{close}'? " if close else "") + "docs/train.md lists every key",
            )
        inner = _struct(hints[key])
        if inner is not None and isinstance(value, Mapping):
            _check_keys(value, inner, f"{prefix}{key}.", where)


def dotted_keys(cls: type[msgspec.Struct], prefix: str = "") -> list[str]:
    """Every key of a config, dotted."""
    found = []
    for key, hint in typing.get_type_hints(cls).items():
        inner = _struct(hint)
        found += [f"{prefix}{key}"] if inner is None else dotted_keys(inner, f"{prefix}{key}.")
    return found


def _struct(hint: Any) -> type[msgspec.Struct] | None:
    """The Struct that a type hint names, also inside a union with None."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return next((item for item in options if isinstance(item, type) and issubclass(item, msgspec.Struct)), None)
