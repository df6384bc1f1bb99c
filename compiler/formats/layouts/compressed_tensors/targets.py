"""Targets of compressed-tensors' config: which linears a group, or a rotation, is for."""

from __future__ import annotations

from optc.compiler.bounded_regex import begins_with
from optc.compiler.formats.layouts.config import ConfigReader
from optc.compiler.formats.safetensors_header import shown

CLASS = "Linear"
"""The target that is every linear."""


def names(target: str, module: str, config: ConfigReader) -> bool:
    """Whether a target is a linear's name, or a pattern ("re:...") that fits it.

    Raises:
        InputError: a pattern that cannot be used: what it is for would be left out, and the numbers be others.
    """
    if not target.startswith("re:"):
        return target == module
    try:
        return begins_with(target[3:], module)
    except ValueError as error:
        why = f"the pattern '{shown(target[:80])}' cannot be used: {error}"
        raise config.refusal(why, remedy="name the linears one by one") from error
