"""The tables of flags and keys in the docs, made of the fields: `python -m optc.cli.flag_tables docs/*.md` writes them.

A table stands between the lines `<!-- table: NAME -->` and `<!-- end -->`; NAME is a section of a request, a target,
`serve`, `training-keys`, or `training-recipes`.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import msgspec

from optc.compiler.settings.fields import Field, fields_of
from optc.request import SECTIONS
from optc.runtime.serving.settings import ServeOptions
from optc.targets.registry import find_target

TRAINING = "training-keys"
RECIPES = "training-recipes"

_STRUCTS: dict[str, type[msgspec.Struct]] = {**SECTIONS, "serve": ServeOptions}

_TABLE = re.compile(r"(<!-- table: ([a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def flag_table(name: str) -> str:
    """The Markdown table of a section of a request, of a target's own options, or of the keys of a training recipe."""
    if name == TRAINING:
        from optc.training.recipe import FIELDS

        rows = ["| key | value | default | meaning |", *map(_key_row, FIELDS.values())]
    elif name == RECIPES:
        return _recipe_table()
    else:
        fields = fields_of(_STRUCTS[name] if name in _STRUCTS else find_target(name).options)
        rows = ["| flag | value | default | meaning |", *map(_row, fields.values())]
    return "\n".join([rows[0], "|---|---|---|---|", *rows[1:]]) + "\n"


def with_tables(text: str) -> str:
    """A document with its tables as they are now."""
    return _TABLE.sub(lambda found: f"{found[1]}{flag_table(found[2])}{found[3]}", text)


def _row(field: Field) -> str:
    negation = field.extra.get("negation")
    flag = f"`--{field.key}`" + (f", `--{negation}`" if negation else "")
    value = "" if field.kind is bool else _escaped(field.expected)
    return f"| {flag} | {value} | {_escaped(field.default_text)} | {_escaped(field.help)} |"


def _key_row(field: Field) -> str:
    default = "false" if field.default is False else field.default_text
    return f"| `{field.key}` | {_escaped(field.expected)} | {_escaped(default)} | {_escaped(field.help)} |"


def _recipe_table() -> str:
    from optc.training.recipe import RECIPES, recipe_keys

    rows = ["| recipe | what it sets |", "|---|---|"]
    for recipe in RECIPES:
        given = (f"`{key}={json.dumps(value)}`".replace('"', "") for key, value in recipe_keys(recipe).items())
        rows.append(f"| `{recipe}` | {', '.join(given)} |")
    return "\n".join(rows) + "\n"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")


def main() -> None:
    """Rewrite the tables of the files that are named."""
    for name in sys.argv[1:]:
        path = Path(name)
        path.write_text(with_tables(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
