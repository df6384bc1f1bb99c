"""`optc plan`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from optc.cli.common import emit, json_option
from optc.cli.options import compile_flags, merge_recipe, require, to_settings


@click.command()
@click.argument("model", required=False)
@compile_flags
@json_option
def plan(as_json: bool, **flags: Any) -> None:
    """Say what a compile would do, and refuse what it could not, before any weight is read.

    \b
    optc plan examples/fiction-3m --target onnx-cpu --quant rtn
    """
    from optc.planning import make_plan
    from optc.targets import find_target

    merged = merge_recipe(flags)
    model = require(merged, "model", "optc plan MODEL --target onnx-cpu")
    target = find_target(require(merged, "target", "--target onnx-cpu (see optc targets)"))
    emit(make_plan(Path(model), target, to_settings(merged)), as_json, _show)


def _show(result: dict[str, Any]) -> None:
    click.echo(
        f"{result['model']} for {result['target']}, {result['dtype']}, quantization {result['quant'] or 'none'}"
    )
    click.echo(f"  parameters: {result['parameters'] / 1e6:.1f} M, {result['linears']} linears")
    names = [row["name"] + (" (if it matches)" if row["optional"] else "") for row in result["passes"]]
    click.echo(f"  passes: {', '.join(names)}")
    if result["quant"]:
        click.echo(f"  group size: {result['group_size'] or 'channel'}")
    click.echo(
        f"  weights: {result['source_weight_bytes'] / 1e6:.1f} MB -> {result['weight_bytes'] / 1e6:.1f} MB"
    )
    if result["kv_cache_bytes_per_token"]:
        click.echo(f"  KV cache: {result['kv_cache_bytes_per_token']} bytes per token")
    if result["note"]:
        click.echo(f"  note: {result['note']}")
