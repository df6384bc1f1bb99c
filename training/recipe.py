"""From a recipe (a YAML file, or one that ships), flags and `--set key=value` to a checked TrainConfig."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from optc.compiler.diagnostics import UsageError, unknown_name
from optc.compiler.settings.fields import Given, nested_fields, read_nested, shown, unknown_key
from optc.compiler.settings.yaml_mapping import parse_mapping, parse_setting, read_mapping
from optc.training.config import TrainConfig

RECIPES = ("pretrain", "finetune", "lora", "qlora", "qat", "distill", "dpo", "eagle3", "medusa")
FIELDS = nested_fields(TrainConfig)
"""Every key of a config, dotted."""

_GROUPS = {key.rpartition(".")[0] for key in FIELDS} - {""}
_LISTED = "docs/train.md lists every key"


def load_config(recipe: str, *, values: Mapping[str, Any] | None = None, settings: Sequence[str] = ()) -> TrainConfig:
    """The config of a run: the recipe, then `values` (dotted key -> value), then `settings` (`key=value` texts).

    Args:
        recipe: the name of a recipe that ships, or the path of a YAML file; its key `recipe` names a recipe that
            it changes.
        values: plain values, or `Given` ones of a command line.

    Raises:
        InputError: the file cannot be read or is not a mapping.
        UsageError: an unknown recipe or key (the nearest name is given), or a value that does not fit.
    """
    given = _read(recipe)
    for key, value in (values or {}).items():
        item = value if isinstance(value, Given) else Given(value=value, where="load_config(values=...)")
        if key not in FIELDS:
            raise unknown_key(key, FIELDS, item.where, listed=_LISTED)
        given[key] = item
    for setting in settings:
        key, value = parse_setting("--set", setting, "optimizer.lr=3e-4")
        given |= _given(_nested(key, value), f"--set {setting}")
    return read_nested(TrainConfig, given)


def convert(tree: Mapping[str, Any], *, where: str) -> TrainConfig:
    """A mapping as TrainConfig.

    Raises:
        UsageError: unknown key or a value of another type or outside its range.
    """
    return read_nested(TrainConfig, _given(tree, where))


def _read(recipe: str) -> dict[str, Given]:
    if recipe in RECIPES:
        text = (resources.files("optc.training") / "recipes" / f"{recipe}.yaml").read_text()
        return _given(parse_mapping(text, recipe), recipe)
    path = Path(recipe)
    if path.suffix not in (".yaml", ".yml") and not path.exists():
        raise unknown_name("recipe", recipe, RECIPES)
    tree = read_mapping(path)
    base = tree.pop("recipe", None)
    if base is not None and base not in RECIPES:
        raise unknown_name("recipe", str(base), RECIPES)
    return ({} if base is None else _read(base)) | _given(tree, str(path))


def recipe_keys(recipe: str) -> dict[str, Any]:
    """Dotted key -> value of what a recipe of optc's sets beside the defaults."""
    found = {key: item.value for key, item in _read(recipe).items()}
    return {key: value for key, value in found.items() if value != FIELDS[key].default}


def _nested(key: str, value: Any) -> dict[str, Any]:
    first, dot, rest = key.partition(".")
    return {first: _nested(rest, value) if dot else value}


def _given(tree: Mapping[str, Any], where: str) -> dict[str, Given]:
    """The values of a tree by dotted key.

    Raises:
        UsageError: a key that the config has no field for (names the nearest one), or a value in place of a group.
    """
    return {key: Given(value=value, where=where) for key, value in _flat(tree, "", where)}


def _flat(tree: Mapping[str, Any], prefix: str, where: str) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if key in _GROUPS:
            if not isinstance(value, Mapping):
                raise UsageError(f"'{key}' is a group of keys, not {shown(value)}", where=where, remedy=_LISTED)
            yield from _flat(value, f"{key}.", where)
        elif key not in FIELDS:
            raise unknown_key(key, FIELDS, where, listed=_LISTED)
        elif isinstance(value, Mapping):
            raise UsageError(f"'{key}' is not a group of keys", where=where, remedy=_LISTED)
        else:
            yield key, value
