"""Registration of the `optc::` dialect: one schema, one eager reference, one fake per op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from optc.compiler.diagnostics import TargetError

_LIBRARY = torch.library.Library("optc", "FRAGMENT")
_REFERENCES: dict[str, Callable[..., Any]] = {}


def define(schema: str, reference: Callable[..., object], fake: Callable[..., object]) -> None:
    """Register an op of the dialect, in whichever order a process meets it and a C++ op library with a kernel for it.

    The library defines the schema only where nobody did, and torch refuses a kernel whose signature is another.

    Args:
        schema: the operator schema without namespace, e.g. `rotary(Tensor x, ...) -> Tensor`.
        reference: eager implementation, obviously right, on any device.
        fake: shape and dtype propagation.

    Raises:
        TargetError: a loaded C++ op library has defined the op with another schema.
    """
    name = schema.split("(", 1)[0]
    _REFERENCES[name] = reference
    if not hasattr(torch.ops.optc, name):
        _LIBRARY.define(schema)
    else:  # by a C++ op library that was loaded before the dialect was imported
        _check_same_schema(name, schema)
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"optc::{name}", fake, lib=_LIBRARY)


def reference(name: str) -> Callable[..., Any]:
    """The eager reference of an op, past the dispatcher (where a C++ kernel may stand in front of it)."""
    return _REFERENCES[name]


def names() -> tuple[str, ...]:
    """Every op of the dialect."""
    return tuple(_REFERENCES)


def _check_same_schema(name: str, schema: str) -> None:
    found = getattr(torch.ops.optc, name).default._schema
    if str(found) != str(torch._C.parse_schema(f"optc::{schema}")):
        raise TargetError(
            f"a C++ op library in this process defines the operator optc::{name} differently from this version of optc",
            why=f"it has {found}",
            remedy="import optc in a process that has not loaded the library of another version",
        )
