"""Strict decoding of JSON values into schema dataclasses: every type is checked, nothing is guessed."""

from __future__ import annotations

import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Any

from optc.compiler import compat

Checks = Mapping[str, Callable[[Any], None]]
"""Class name -> check of a decoded object. A class that is absent is refused."""


class RefusedError(Exception):
    """Why a part of the data is refused; the path grows as the exception rises."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.path: list[str] = []


def require(condition: bool, reason: str) -> None:
    """Raise RefusedError unless the condition holds."""
    if not condition:
        raise RefusedError(reason)


@lru_cache(maxsize=256)
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, globalns=vars(compat.graph_schema))


def decode(hint: Any, data: Any, checks: Checks) -> Any:
    """The value of type `hint` that `data` stands for; each decoded object passes its check.

    Raises:
        RefusedError: with the reason and the path to the place.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        inner = next(argument for argument in arguments if argument is not types.NoneType)
        return None if data is None else decode(inner, data, checks)
    if origin is list and isinstance(data, list):
        return [_decode_at(f"[{i}]{_label(item)}", arguments[0], item, checks) for i, item in enumerate(data)]
    if origin is dict and isinstance(data, dict):
        return {key: _decode_at(f".{key}", arguments[1], value, checks) for key, value in data.items()}
    if hint is float and (type(data) in (int, float) or data in ("Infinity", "-Infinity", "NaN")):
        return float(data)
    if hint in (int, bool, str) and type(data) is hint:
        return data
    if isinstance(hint, type) and issubclass(hint, IntEnum) and type(data) is int and data in set(hint):
        return hint(data)
    if is_dataclass(hint) and isinstance(data, dict):
        return _decode_object(hint, data, checks)
    raise RefusedError(f"expected {getattr(hint, '__name__', hint)}, found {type(data).__name__} {str(data)[:60]!r}")


def _decode_at(step: str, hint: Any, data: Any, checks: Checks) -> Any:
    try:
        return decode(hint, data, checks)
    except RefusedError as error:
        error.path.append(step)
        raise


def _label(item: Any) -> str:
    name = item.get("name") if isinstance(item, dict) else None
    return f" ({name[:60]})" if isinstance(name, str) else ""


def _decode_object(cls: Any, data: dict[str, Any], checks: Checks) -> Any:
    check = checks.get(cls.__name__)
    if check is None:
        raise RefusedError(f"{cls.__name__} is not allowed here")
    unknown = sorted(str(key) for key in data.keys() - {item.name for item in fields(cls)})
    require(not unknown, f"{cls.__name__} has unknown fields: {', '.join(unknown)[:200]}")
    values = {key: _decode_at(f".{key}", _hints(cls)[key], value, checks) for key, value in data.items()}
    if compat.is_union(cls):
        require(len(values) == 1, f"{cls.__name__} must hold one value, found {len(values)}")
        found = cls.create(**values)
    else:
        missing = [
            item.name
            for item in fields(cls)
            if item.name not in values and item.default is MISSING and item.default_factory is MISSING
        ]
        require(not missing, f"{cls.__name__} lacks {', '.join(missing)}")
        found = cls(**values)
    check(found)
    return found
