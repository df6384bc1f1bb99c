"""`optc targets`."""

from __future__ import annotations

from typing import Any

import click

from optc.cli.common import emit, json_option, say


@click.command()
@json_option
def targets(as_json: bool) -> None:
    """List the targets, with the dtypes, KV caches, options and quantizations each one takes.

    \b
    optc targets
    """
    from optc.compiler.settings.fields import fields_of
    from optc.targets.registry import all_targets

    rows = [
        {
            "name": target.name,
            "aliases": list(target.aliases),
            "summary": target.summary,
            "device": target.device,
            "dtypes": list(target.dtypes),
            "kv_caches": list(target.kv_caches),
            "options": [
                {"name": field.key, "takes": field.expected, "default": field.default_text, "help": field.help}
                for field in fields_of(target.options).values()
            ],
            "quant": {
                name: {
                    "bits": list(row.bits),
                    "group_sizes": list(row.group_sizes),
                    "symmetric": list(row.symmetric),
                    "note": row.note,
                }
                for name, row in target.quant.items()
            },
        }
        for target in all_targets()
    ]
    emit({"targets": rows}, as_json, _show)


def _show(result: dict[str, Any]) -> None:
    for row in result["targets"]:
        alias = f" (alias {', '.join(row['aliases'])})" if row["aliases"] else ""
        say(f"{row['name']}{alias}: {row['summary']}")
        say(f"    dtypes {', '.join(row['dtypes'])}; KV caches {', '.join(row['kv_caches']) or 'none'}")
        for option in row["options"]:
            default = f"; default: {option['default']}" if option["default"] else ""
            say(f"    --{option['name']}: {option['takes']}{default}")
        for name, quant in row["quant"].items():
            sizes = ", ".join("channel" if size == 0 else str(size) for size in quant["group_sizes"])
            groups = f"; groups of {sizes}" if sizes else ""  # none to choose
            note = f" ({quant['note']})" if quant["note"] else ""
            say(f"    {name}: {', '.join(map(str, quant['bits']))} bits{groups}{note}")
