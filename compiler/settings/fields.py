"""Fields of typed structs: their help, bounds and defaults, and reading values with errors that name all of it.

The request of a compile, the options of commands and the configuration of training are such structs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from optc.compiler.diagnostics import UsageError, nearest, unknown_name

StructT = TypeVar("StructT", bound=msgspec.Struct)

Bounds = tuple[float | None, float | None, float | None, float | None]
"""(ge, gt, le, lt) of a number, None where there is none."""

_KINDS = {int: "an integer", float: "a number", bool: "true or false", Path: "a path", str: "text"}


@dataclass(frozen=True, kw_only=True)
class Given:
    """A value that someone gave for a field.

    Attributes:
        where: the place, as an error names it: "the command line", or a recipe's file and key.
        text: the value is text of a command line, "4" being a number; otherwise types are exact.
    """

    value: Any
    where: str
    text: bool = False


@dataclass(frozen=True, kw_only=True)
class Field:
    """One field of a struct.

    Attributes:
        key: its name where people give it: with hyphens for flags and recipes of a compile, dotted in nested structs.
        kind: int, float, bool, str, Path, `Literal[...]`, `tuple[str, ...]` or a class; without None.
        extra: of `Meta`: "default" (its text, where it depends on something), "negation" (the flag that says no),
            "metavar", "short" (a flag of one letter), "read" (a function of the value, for kinds that are not plain),
            "joined" (a list that a command line gives as one text, not by repeating the flag).
    """

    name: str
    key: str
    kind: Any
    default: Any
    required: bool
    help: str
    bounds: Bounds
    extra: Mapping[str, Any]
    hint: Any

    @property
    def choices(self) -> tuple[str, ...]:
        """The names (or numbers) that the value is one of; () for other kinds."""
        return tuple(map(str, typing.get_args(self.kind))) if typing.get_origin(self.kind) is Literal else ()

    @property
    def repeatable(self) -> bool:
        """Whether the value is a list."""
        return typing.get_origin(self.kind) is tuple

    @property
    def default_text(self) -> str:
        """The default as help and docs say it; "" where leaving the field out is the plain thing to do."""
        if "default" in self.extra:
            return str(self.extra["default"])
        if self.default is None or self.default is False or self.default in ((), ""):
            return ""
        if isinstance(self.default, tuple):
            return ", ".join(map(str, self.default))
        return "true" if self.default is True else str(self.default)

    @property
    def expected(self) -> str:
        """What a value must be, with its bounds."""
        if "expected" in self.extra:
            return str(self.extra["expected"])
        if self.choices:
            return "one of " + ", ".join(self.choices)
        kind = _KINDS.get(self.kind, "a value")
        if self.repeatable:
            items = typing.get_args(self.kind)
            kind = "text, or a list of texts" if str in items else f"a list of {_KINDS.get(items[0], 'value')[2:]}s"
        return _within(kind, self.bounds)

    def read(self, given: Given) -> Any:
        """The value in the field's type.

        Raises:
            UsageError: another type, or out of bounds; says the field, the value, what is expected and where.
        """
        value = given.value
        try:
            return self._converted(value, given.text)
        except (msgspec.ValidationError, ValueError, TypeError) as error:
            if self.choices and isinstance(value, str):
                problem = unknown_name(self.key, value, self.choices)
                problem = UsageError(problem.what, where=given.where, remedy=problem.remedy)
            else:
                problem = UsageError(
                    f"'{self.key}' cannot be {shown(value)}",
                    where=given.where,
                    remedy=f"give {self.expected}",
                )
            raise problem from error

    def _converted(self, value: Any, text: bool) -> Any:
        reader = self.extra.get("read")
        if reader is not None:
            return reader(value)
        if self.kind is Path:
            if not isinstance(value, str | Path) or not str(value) or "\0" in str(value):
                raise TypeError
            return Path(value)
        if self.repeatable and isinstance(value, str):
            value = (value,)
        if isinstance(value, str) and "\0" in value:
            raise ValueError
        return msgspec.convert(value, self.hint, strict=not text)


def check_range(name: str, value: float, kind: Any) -> None:
    """Hold a number of a call from Python to the bounds of its type, `Annotated[int, Meta(ge=1)]`.

    Raises:
        UsageError: it is out of them, not finite, or no number of that type (NumPy's are); says which they are.
    """
    kind, (low, above, high, below), remedy = _range_of(kind)
    wanted: type = numbers.Integral if kind is int else numbers.Real
    if isinstance(value, bool) or not isinstance(value, wanted):
        raise UsageError(f"{name} cannot be {shown(value)}", remedy=remedy)
    good = (low is None or value >= low) and (above is None or value > above)
    good = good and (high is None or value <= high) and (below is None or value < below)
    if not (good and abs(value) < math.inf):
        raise UsageError(f"{name} {value} is out of range", remedy=remedy)


@functools.cache
def _range_of(hint: Any) -> tuple[Any, Bounds, str]:
    """The plain type of a hint, its bounds, and what to give: asked for each request that a server gets."""
    kind, metas = _stripped(hint)
    bounds = _bounds(metas)
    return kind, bounds, f"give {_within(_KINDS[kind], bounds)}"


def check_type(name: str, value: Any, kind: Any, expected: str) -> None:
    """Hold an argument of a call from Python to its type.

    Args:
        kind: a class, a union of classes, or a type of plain values (`dict[str, int]`).
        expected: what is to be given, in words.

    Raises:
        UsageError: it is something else.
    """
    try:
        if typing.get_origin(kind) in (dict, tuple):
            msgspec.convert(value, kind)
            return
        good = isinstance(value, kind)
    except (msgspec.ValidationError, UnicodeError):
        good = False
    if not good:
        raise UsageError(f"{name} cannot be {shown(value)}", remedy=f"give {expected}")


def check_struct(part: msgspec.Struct) -> None:
    """Read every value of a struct that was made by hand, as those of flags and recipes are read.

    Raises:
        UsageError: a value of another type or out of its bounds; names the field.
    """
    for name, field in fields_of(type(part)).items():
        value = getattr(part, name)
        if value is not field.default:
            field.read(Given(value=value, where=f"{type(part).__name__}({name}=...)"))


def fields_of(cls: type[msgspec.Struct]) -> dict[str, Field]:
    """The fields of a struct by name, structs inside it left out."""
    return {name: field for name, field in _members(cls) if isinstance(field, Field)}


def nested_fields(cls: type[msgspec.Struct], prefix: str = "") -> dict[str, Field]:
    """The fields of a struct and of the structs inside it by dotted key, which is their name too."""
    found: dict[str, Field] = {}
    for name, member in _members(cls):
        if isinstance(member, Field):
            key = f"{prefix}{name}"
            found[key] = dataclasses.replace(member, key=key)
        else:
            found |= nested_fields(member, f"{prefix}{name}.")
    return found


def read_fields(cls: type[msgspec.Struct], given: Mapping[str, Given]) -> dict[str, Any]:
    """The values of a struct's fields, of those that are given."""
    return {name: field.read(given[name]) for name, field in fields_of(cls).items() if name in given}


def read_nested(cls: type[StructT], given: Mapping[str, Given], prefix: str = "") -> StructT:
    """A struct of structs from the values of its dotted keys, all of which it has (`nested_fields`).

    Raises:
        UsageError: a value of another type or out of its bounds.
    """
    values: dict[str, Any] = {}
    for name, member in _members(cls):
        key = f"{prefix}{name}"
        if not isinstance(member, Field):
            values[name] = read_nested(member, given, f"{key}.")
        elif key in given and (given[key].value is not None or member.default is not None):
            values[name] = dataclasses.replace(member, key=key).read(given[key])
    return cls(**values)


def unknown_key(name: str, known: Iterable[str], where: str, *, listed: str = "") -> UsageError:
    """The error for a key that no field has; `listed` says where all are listed, in place of the list itself."""
    keys = sorted(known)
    close = nearest(name, keys) or nearest(name.rpartition(".")[2], [key.rpartition(".")[2] for key in keys])
    close = next((key for key in keys if key == close or key.endswith(f".{close}")), None) if close else None
    return UsageError(
        f"unknown key '{name}'",
        where=where,
        remedy=(f"did you mean '{close}'? " if close else "") + (listed or f"known: {', '.join(keys)}"),
    )


@functools.cache
def _members(cls: type[msgspec.Struct]) -> tuple[tuple[str, Field | type[msgspec.Struct]], ...]:
    """Name -> field, or the struct inside. Asked many times for each command; reading the hints takes milliseconds."""
    hints = typing.get_type_hints(cls, include_extras=True)
    defaults = {item.name: item for item in msgspec.structs.fields(cls)}
    found: list[tuple[str, Field | type[msgspec.Struct]]] = []
    for name, hint in hints.items():
        if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
            found.append((name, hint))
        elif name in defaults:
            found.append((name, _field(name, hint, defaults[name])))
    return tuple(found)


def _field(name: str, hint: Any, info: msgspec.structs.FieldInfo) -> Field:
    kind, metas = _stripped(hint)
    help_ = next((meta.description for meta in metas if meta.description), "")
    extra = {key: value for meta in reversed(metas) for key, value in (meta.extra or {}).items()}
    plain = Annotated[kind, *metas] if metas else kind
    return Field(
        name=name,
        key=name.replace("_", "-"),
        kind=kind,
        default=None if info.required else info.default,
        required=info.required,
        help=help_,
        bounds=_bounds(metas),
        extra=extra,
        hint=plain,
    )


def _bounds(metas: Sequence[msgspec.Meta]) -> Bounds:
    ge, gt, le, lt = (
        next((getattr(meta, key) for meta in metas if getattr(meta, key) is not None), None)
        for key in ("ge", "gt", "le", "lt")
    )
    return ge, gt, le, lt


def _stripped(hint: Any) -> tuple[Any, list[msgspec.Meta]]:
    """A hint without None and annotations, and its metas, the outer first."""
    metas: list[msgspec.Meta] = []
    while True:
        if typing.get_origin(hint) is Annotated:
            hint, *more = typing.get_args(hint)
            metas += [item for item in more if isinstance(item, msgspec.Meta)]
        elif isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
            parts: Sequence[Any] = [item for item in typing.get_args(hint) if item is not type(None)]
            if len(parts) != 1:
                return hint, metas
            (hint,) = parts
        else:
            return hint, metas


def _within(kind: str, bounds: Bounds) -> str:
    """A kind of value with its bounds, in words."""
    ge, gt, le, lt = (None if bound is None else _number(bound) for bound in bounds)
    if ge is not None and le is not None:
        return f"{kind} from {ge} to {le}"
    low = f"{ge} or more" if ge is not None else f"more than {gt}" if gt is not None else ""
    high = f"{le} or less" if le is not None else f"less than {lt}" if lt is not None else ""
    return ", ".join(part for part in (kind, low, high) if part)


def _number(bound: float) -> str:
    return str(int(bound)) if bound == int(bound) else str(bound)


def shown(value: Any) -> str:
    """A value as errors show it, of at most 60 characters."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # nested without end; a number of more digits than Python writes
        text = f"this {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."
