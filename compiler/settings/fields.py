"""Fields of typed structs: their help, bounds and defaults, and reading one value with an error that names all of it."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from optc.compiler.diagnostics import UsageError, nearest, unknown_name


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
        kind: int, float, bool, str, Path, `Literal[...]`, `tuple[str, ...]` or a class; without None.
        bounds: (ge, gt, le, lt) of a number, None where there is none.
        extra: of `Meta`: "default" (its text, where it depends on something), "negation" (the flag that says no),
            "metavar", "short" (a flag of one letter), "read" (a function of the value, for kinds that are not plain).
    """

    name: str
    kind: Any
    default: Any
    help: str
    bounds: tuple[float | None, float | None, float | None, float | None]
    extra: Mapping[str, Any]
    hint: Any

    @property
    def key(self) -> str:
        """The name in recipes and on the command line."""
        return self.name.replace("_", "-")

    @property
    def choices(self) -> tuple[str, ...]:
        """The names that the value is one of; () for other kinds."""
        return typing.get_args(self.kind) if typing.get_origin(self.kind) is Literal else ()

    @property
    def repeatable(self) -> bool:
        """Whether the value is a list of texts."""
        return typing.get_origin(self.kind) is tuple

    @property
    def default_text(self) -> str:
        """The default as help and docs say it; "" where leaving the field out is the plain thing to do."""
        if "default" in self.extra:
            return str(self.extra["default"])
        return "" if self.default in (None, False, (), "") else str(self.default)

    @property
    def expected(self) -> str:
        """What a value must be, with its bounds."""
        if "expected" in self.extra:
            return str(self.extra["expected"])
        if self.choices:
            return "one of " + ", ".join(self.choices)
        names = {int: "an integer", float: "a number", bool: "true or false", Path: "a path", str: "text"}
        kind = "text, or a list of texts" if self.repeatable else names.get(self.kind, "a value")
        ge, gt, le, lt = (None if bound is None else _number(bound) for bound in self.bounds)
        if ge is not None and le is not None:
            return f"{kind} from {ge} to {le}"
        low = f"{ge} or more" if ge is not None else f"more than {gt}" if gt is not None else ""
        high = f"{le} or less" if le is not None else f"less than {lt}" if lt is not None else ""
        return ", ".join(part for part in (kind, low, high) if part)

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
                    f"'{self.key}' cannot be {_shown(value)}",
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
        return msgspec.convert(value, self.hint, strict=not text or self.repeatable)


def fields_of(cls: type[msgspec.Struct]) -> dict[str, Field]:
    """The fields of a struct by name, structs inside it left out."""
    hints = typing.get_type_hints(cls, include_extras=True)
    defaults = {item.name: item.default for item in msgspec.structs.fields(cls)}
    return {
        name: _field(name, hint, None if defaults[name] is msgspec.NODEFAULT else defaults[name])
        for name, hint in hints.items()
        if not (isinstance(hint, type) and issubclass(hint, msgspec.Struct))
    }


def read_fields(cls: type[msgspec.Struct], given: Mapping[str, Given]) -> dict[str, Any]:
    """The values of a struct's fields, of those that are given."""
    return {name: field.read(given[name]) for name, field in fields_of(cls).items() if name in given}


def unknown_key(name: str, known: Iterable[str], where: str) -> UsageError:
    """The error for a key that no field has."""
    keys = sorted(item.replace("_", "-") for item in known)
    close = nearest(name, keys)
    return UsageError(
        f"unknown key '{name}'",
        where=where,
        remedy=(f"did you mean '{close}'? " if close else "") + f"known: {', '.join(keys)}",
    )


def _field(name: str, hint: Any, default: Any) -> Field:
    kind, metas = _stripped(hint)
    bounds = tuple(
        next((getattr(meta, key) for meta in metas if getattr(meta, key) is not None), None)
        for key in ("ge", "gt", "le", "lt")
    )
    help_ = next((meta.description for meta in metas if meta.description), "")
    extra = {key: value for meta in reversed(metas) for key, value in (meta.extra or {}).items()}
    plain = Annotated[kind, *metas] if metas else kind
    return Field(name=name, kind=kind, default=default, help=help_, bounds=bounds, extra=extra, hint=plain)  # type: ignore[arg-type]


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


def _number(bound: float) -> str:
    return str(int(bound)) if bound == int(bound) else str(bound)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
