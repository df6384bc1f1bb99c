"""Patterns of weight names, as `--ignore` and `qat.ignore` take them.

*.down_proj.*                   * and ? in the whole name, with or without its ".weight"
model.layers.0.mlp.up_proj      a module's name
lm_head, *_proj                 the last part of a module's name
re:.*self_attn.*                a regular expression that fits the beginning of a module's name, as llm-compressor has it
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

from optc.compiler.bounded_regex import begins_with
from optc.compiler.diagnostics import NoMatchError, UsageError

_WEIGHT = ".weight"
_REGEX = "re:"


def fits(name: str, pattern: str) -> bool:
    """Whether a pattern names a weight.

    Raises:
        UsageError: a regular expression that is none, or takes too long.
    """
    module = name.removesuffix(_WEIGHT)
    if pattern.startswith(_REGEX):
        try:
            return begins_with(pattern.removeprefix(_REGEX), module)
        except ValueError as error:
            raise UsageError(
                f"the pattern '{pattern[:80]}' cannot be used",
                why=str(error),
                remedy="use a simpler one, such as *.up_proj",
            ) from error
    last = module.rpartition(".")[2]
    return (
        fnmatchcase(name, pattern)
        or fnmatchcase(module, pattern)
        or ("." not in pattern and fnmatchcase(last, pattern))
    )


def check_patterns(option: str, patterns: Iterable[str], names: Collection[str]) -> None:
    """Refuse a pattern that matches none of a model's weights: what it was to keep would be changed.

    Args:
        option: where the patterns were given, as errors name it.
        names: all weights of the model.

    Raises:
        NoMatchError: names the pattern, and the nearest names, or one that would match, where there are any.
    """
    for pattern in patterns:
        if any(fits(name, pattern) for name in names):
            continue
        core = pattern.removeprefix(_REGEX).replace(".*", "*").strip("*^$")
        wider = [item for item in (f"*{core}.weight", f"*{core}*") if any(fnmatchcase(name, item) for name in names)]
        near = _nearest(pattern, core, names)
        raise NoMatchError(
            f"{option}: '{pattern}' matches no weight",
            why=f"names look like {', '.join(near)}",
            remedy=f"use '{wider[0]}'" if core and wider else "correct the pattern, or leave it out",
        )


def _nearest(pattern: str, core: str, names: Collection[str]) -> list[str]:
    """Up to three names like a pattern: as a whole, else those whose last part is like the pattern's; else the first."""
    if whole := difflib.get_close_matches(pattern, list(names), n=3, cutoff=0.5):
        return whole
    lasts = {name: name.removesuffix(_WEIGHT).rpartition(".")[2] for name in names}
    like = difflib.get_close_matches(core.rpartition(".")[2], sorted(set(lasts.values())), n=1)
    return [name for name, last in lasts.items() if last in like][:3] or list(names)[:3]
