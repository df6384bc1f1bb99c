"""YAML files of settings: recipes of a compile and of a training run, and values given as text."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from optc.compiler.diagnostics import InputError, UsageError, described
from optc.compiler.files import read_plain

_MOST_BYTES = 16 << 20
_MOST_VALUES = 100_000
_NOT_YAML = (yaml.YAMLError, ValueError, RecursionError, TypeError, AttributeError, LookupError, OverflowError)
"""What PyYAML raises on text: its constructors of dates and numbers stumble in several ways."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but 3e-4 is a number, as YAML 1.2 and everybody else have it."""


_Loader.yaml_implicit_resolvers = {key: list(value) for key, value in yaml.SafeLoader.yaml_implicit_resolvers.items()}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_mapping(path: Path) -> dict[str, Any]:
    """The keys and values of a YAML file.

    Raises:
        InputError: it cannot be read, is not YAML, or is not a mapping with names as keys.
    """
    data = read_plain(path, "reading the recipe", most=_MOST_BYTES)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            "the recipe cannot be read", where=str(path), why=str(error), remedy="give a YAML file"
        ) from error
    return parse_mapping(text, str(path))


def parse_mapping(text: str, where: str) -> dict[str, Any]:
    """The keys and values of YAML text; `where` names it in errors.

    Raises:
        InputError: it is not YAML, or not a mapping with names as keys.
    """
    try:
        tree = _loaded(text)
    except _NOT_YAML as error:
        raise InputError(
            "the recipe is not YAML", where=where, why=str(error), remedy="write `key: value` lines"
        ) from error
    if not isinstance(tree, dict) or not all(isinstance(key, str) for key in tree):
        raise InputError("the recipe is not a mapping", where=where, remedy="write `key: value` lines")
    return tree


def _loaded(text: str) -> Any:
    """The value of YAML text, of which no part comes so often that printing it takes forever.

    Raises:
        one of _NOT_YAML.
    """
    tree = yaml.load(text, _Loader)
    pending, count = [tree], 0
    while pending:
        value = pending.pop()
        count += 1
        if count > _MOST_VALUES:
            raise ValueError(f"it stands for more than {_MOST_VALUES} values")
        if isinstance(value, dict):
            pending += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set):
            pending += value
    return tree


def parse_setting(flag: str, setting: str, form: str) -> tuple[str, Any]:
    """KEY=VALUE as a flag gives it, the value as in YAML.

    Args:
        form: an example, for the error.

    Raises:
        UsageError: no key, or a value that is not YAML.
    """
    key, equals, text = setting.partition("=")
    if not equals or not key.strip():
        raise UsageError(f"cannot read {flag} '{setting}'", remedy=f"write {form}")
    try:
        return key.strip(), _loaded(text)
    except _NOT_YAML as error:
        raise UsageError(
            f"cannot read {flag} '{setting}'",
            why=described(error),
            remedy=f"write {form}, the value as in YAML",
        ) from error
