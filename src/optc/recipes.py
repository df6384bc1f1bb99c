"""The steps of a pipeline by name: passes with options, and where one is put into a recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from optc.compiler.diagnostics import UsageError, unknown_name
from optc.compiler.rewriting.passes import Pass
from optc.compiler.settings.yaml_mapping import parse_setting
from optc.compiler.target.options import QuantRequest
from optc.compiler.target.target import Step
from optc.passes.registry import find_pass


def make_pass(name: str, options: Mapping[str, Any] | None = None) -> Pass:
    """A pass by name with options given as plain values.

    Raises:
        UsageError: unknown pass or option, or a value of the wrong type.
    """
    return _made(find_pass(name), options)


def _made(cls: type[Pass], options: Mapping[str, Any] | None) -> Pass:
    fields = {field.name for field in dataclasses.fields(cls)}
    given = {key.replace("-", "_"): value for key, value in (options or {}).items()}
    for key in given:
        if key not in fields:
            raise unknown_name(f"option of pass '{cls.name}'", key, fields)
    try:
        return msgspec.convert(given, cls, strict=False)
    except (msgspec.ValidationError, UnicodeError) as error:  # UnicodeError: half of a surrogate pair
        raise UsageError(f"invalid option of pass '{cls.name}'", why=str(error), remedy="see optc passes") from error


def parse_passes(items: Sequence[str | Mapping[str, Any]], asked: QuantRequest) -> list[Step]:
    """Requested passes: names, or one-key mappings name -> options as YAML has them.

    Quantization passes that give no options of their own take the flags (`--bits` and so on).
    """
    steps = []
    for item in items:
        name, given = (item, {}) if isinstance(item, str) else next(iter(item.items()))
        cls = find_pass(str(name))
        own = {str(key).replace("-", "_"): value for key, value in (given or {}).items()}
        merged = {**flags_for(cls, asked), **own} if cls.lossy else own
        if merged.get("group_size") == "auto":
            raise UsageError(
                f"group size 'auto' is for --quant, and {cls.name} is named by itself",
                remedy=f"give the sizes to choose from: {{{cls.name}: {{group_size: [128, 64, 32]}}}}",
            )
        steps.append(Step(make_pass(str(name), merged)))
    return steps


def flags_for(cls: type[Pass], asked: QuantRequest) -> dict[str, Any]:
    """The flags of quantization that were given and that a pass has fields for."""
    fields = {field.name for field in dataclasses.fields(cls)}
    given = msgspec.structs.asdict(asked)
    return {key: value for key, value in given.items() if key in fields and value not in (None, ())}


def apply_pass_options(steps: Sequence[Step], settings: Sequence[str]) -> list[Step]:
    """Apply `NAME.OPTION=VALUE` settings to the steps of a recipe.

    Raises:
        UsageError: malformed setting, or a pass that the recipe does not have.
    """
    out = list(steps)
    for setting in settings:
        path, value = parse_setting("--pass-option", setting, "NAME.OPTION=VALUE")
        name, dot, option = path.partition(".")
        if not dot:
            raise UsageError(f"cannot read --pass-option '{setting}'", remedy="write NAME.OPTION=VALUE")
        for i in _places(out, name):
            merged = {**out[i].rewrite.options(), option.replace("-", "_"): value}
            out[i] = dataclasses.replace(out[i], rewrite=_made(type(out[i].rewrite), merged))
    return out


def _places(steps: Sequence[Step], name: str) -> list[int]:
    """Where a recipe has a pass.

    Raises:
        UsageError: nowhere.
    """
    plain = name.replace("_", "-")
    found = [index for index, step in enumerate(steps) if step.rewrite.name == plain]
    if not found:
        raise unknown_name("pass of this recipe", name, dict.fromkeys(step.rewrite.name for step in steps))
    return found


def insert_passes(steps: Sequence[Step], insertions: Sequence[str], asked: QuantRequest) -> list[Step]:
    """A recipe with further passes, each before or behind one that it has: `before:NAME=PASS`, `after:NAME=PASS`.

    A pass that the recipe has twice is met by its first place before it, and by its last behind it.

    Raises:
        UsageError: malformed, a pass that the recipe does not have, or an unknown pass.
    """
    out = list(steps)
    for text in insertions:
        where, equals, name = text.partition("=")
        side, colon, anchor = where.partition(":")
        if side not in ("before", "after") or not (equals and colon and anchor and name):
            raise UsageError(
                f"cannot read --insert-pass '{text}'",
                remedy="write before:NAME=PASS or after:NAME=PASS, PASS being a name (optc passes) or module:Class",
            )
        places = _places(out, anchor)
        (step,) = parse_passes([name], asked)
        out.insert(places[0] if side == "before" else places[-1] + 1, step)
    return out
