"""Registration of the `optc::` dialect: one schema, one eager reference, one fake per op."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("optc", "FRAGMENT")
_REFERENCES: dict[str, Callable[..., Any]] = {}


def define(schema: str, reference: Callable[..., object], fake: Callable[..., object]) -> None:
    """Register an op of the dialect.

    Args:
        schema: the operator schema without namespace, e.g. `rotary(Tensor x, ...) -> Tensor`.
        reference: eager implementation, obviously right, on any device.
        fake: shape and dtype propagation.
    """
    name = schema.split("(", 1)[0]
    _REFERENCES[name] = reference
    if not hasattr(torch.ops.optc, name):  # a loaded C++ op library may have defined it
        _LIBRARY.define(schema)
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"optc::{name}", fake, lib=_LIBRARY)


def reference(name: str) -> Callable[..., Any]:
    """The eager reference of an op, past the dispatcher (where a C++ kernel may stand in front of it)."""
    return _REFERENCES[name]
