"""`optc passes`."""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from optc.cli.common import emit, json_option, say


@click.command()
@json_option
def passes(as_json: bool) -> None:
    """List the passes: the rewrite each one does, and its options with defaults.

    \b
    optc passes
    optc compile MODEL --target onnx-cpu -o OUT --pass-option quantize-rtn.bits=8
    """
    from optc.passes import registry

    rows = []
    for name, cls in registry.passes().items():
        options = [
            {"name": field.name.replace("_", "-"), "type": str(field.type), "default": _plain(field.default)}
            for field in dataclasses.fields(cls)
        ]
        rewrite = (cls.__doc__ or "").strip().splitlines()[0]
        rows.append({"name": name, "rewrite": rewrite, "lossy": cls.lossy, "options": options})
    emit({"passes": rows}, as_json, _show)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _show(result: dict[str, Any]) -> None:
    for row in result["passes"]:
        say(f"{row['name']}{' (lossy)' if row['lossy'] else ''}: {row['rewrite']}")
        for option in row["options"]:
            say(f"    {option['name']}: {option['type']} = {option['default']}")
