"""Targets of compressed-tensors' config: which linears a group, or a rotation, is for."""

from __future__ import annotations

from optc.compiler.bounded_regex import begins_with


def names(target: str, module: str) -> bool:
    """Whether a target is a linear's name, or a pattern ("re:...") that fits it; one that cannot be used fits none."""
    if not target.startswith("re:"):
        return target == module
    try:
        return begins_with(target[3:], module)
    except ValueError:
        return False
