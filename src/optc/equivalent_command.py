"""What a compile was asked for as one line, for people who want it again: a command, or a call in Python."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optc.compiler.diagnostics import UsageError
from optc.compiler.settings.fields import Field
from optc.request import Request
from optc.saved_recipes import asked_for, plain


def command_of(model: Any, request: Request) -> str:
    """The command line that asks for the same, with what differs from the defaults alone.

    Of a model, a pass or tokens in memory, which no command line can name, it is the call of `optc.compile`; what has no
    short name there either is "...".
    """
    if isinstance(model, str | Path):
        try:
            words = [word for field, value in asked_for(request) for word in _flags(field, plain(value))]
        except UsageError:
            return _call(repr(str(model)), request)
        return shlex.join(["optc", "compile", str(model), "--target", request.target.name, *words])
    return _call(f"<{type(model).__name__}>", request)


def _flags(field: Field, value: Any) -> Iterator[str]:
    """The words of a command line that set a field.

    Raises:
        UsageError: a pass with options of its own, which no flag gives to this one alone.
    """
    name = field.extra.get("short") or f"--{field.key}"
    if isinstance(value, bool):
        yield name if value else f"--{field.extra.get('negation', field.key)}"
        return
    items = value if isinstance(value, list) else [value]
    if any(isinstance(item, dict) for item in items):
        raise UsageError(f"--{field.key} takes no options", remedy="call optc.compile from Python")
    texts = list(map(str, items))
    for text in [",".join(texts)] if field.extra.get("joined") else texts:
        yield from (name, text)


def _call(model: str, request: Request) -> str:
    values = [("target", repr(request.target.name))]
    values += [(field.name, _literal(value)) for field, value in asked_for(request)]
    return f"optc.compile({', '.join([model, *(f'{name}={text}' for name, text in values)])})"


def _literal(value: Any) -> str:
    """A value as Python writes it, "..." for tensors and other objects."""
    try:
        return repr(plain(value))
    except UsageError:
        return "..."
