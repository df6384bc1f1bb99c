"""Options of a compile as a target's recipe gets them, from keys as `optc.compile` takes them."""

from __future__ import annotations

from typing import Any

from optc.compiler.target.options import CompileOptions
from optc.request import from_python
from optc.resolving import resolve


def chosen(target: str, **options: Any) -> CompileOptions:
    """The resolved options of a request."""
    return resolve(from_python(target, **options)).options
