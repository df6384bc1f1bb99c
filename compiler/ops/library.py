"""Registration of the `optc::` dialect: one schema, one eager reference, one fake per op."""

from __future__ import annotations

from collections.abc import Callable

import torch

_LIBRARY = torch.library.Library("optc", "FRAGMENT")


def define(schema: str, reference: Callable[..., object], fake: Callable[..., object]) -> None:
    """Register an op of the dialect.

    Args:
        schema: the operator schema without namespace, e.g. `rotary(Tensor x, ...) -> Tensor`.
        reference: eager implementation, obviously right, on any device.
        fake: shape and dtype propagation.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"optc::{name}", fake, lib=_LIBRARY)
