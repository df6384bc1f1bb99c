"""`optc compile`."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from optc.cli.common import emit, json_option, say, stderr
from optc.cli.garbage import is_small, uncollected
from optc.cli.lean_imports import import_transformers
from optc.cli.options import GroupedCommand
from optc.cli.request_flags import merge_recipe, request_flags, request_of, require
from optc.compiler.artifact.drift_table import drift_table, pass_title
from optc.compiler.artifact.publishing import check_output
from optc.compiler.artifact.sizes import Sizes, group_text
from optc.compiler.diagnostics import UsageError, printable
from optc.progress import progress
from optc.request import SECTIONS, Request

_TABLE_WIDTH = 110  # a narrower terminal wraps lines rather than cut numbers


@click.command(name="compile", cls=GroupedCommand)
@click.argument("model", required=False)
@request_flags(SECTIONS)
@json_option
def compile_(as_json: bool, **flags: Any) -> None:
    """Compile MODEL (a Hugging Face folder, or its name on the hub) for a target.

    After each pass the program is run and compared with the stage before and with the capture; a miss names the pass and
    exits with 5, a requested pass that matches nothing with 6.

    \b
    optc compile examples/fiction-3m --target onnx-cpu --quant rtn -o out/fiction-onnx
    optc compile examples/fiction-3m --target inductor-cpu -o out/fiction-pt2
    optc compile Qwen/Qwen2.5-0.5B --target onnx-cpu --quant rtn -o out/qwen-onnx
    optc compile --recipe recipe.yaml --force
    """
    merged = merge_recipe(flags)
    model = require(merged, "model", "optc compile MODEL --target onnx-cpu -o OUT")
    target = require(merged, "target", "--target onnx-cpu (see optc targets)")
    run_compile(model, target, lambda: request_of(merged, target), as_json, "compiling")


def run_compile(model: str, target: str, asked: Callable[[], Request], as_json: bool, doing: str) -> None:
    """Compile, with a progress bar, and print the result.

    Args:
        asked: makes the request; the target that it reads imports torch, which takes seconds.
    """
    with progress(f"{doing} for {target}") as update, uncollected() if is_small(model) else nullcontext():
        request = asked()
        if request.run.output is None:
            raise UsageError("no output given", remedy="-o OUT")
        check_output(request.run.output, request.run.force)
        from optc.api import compile, resolve_for
        from optc.drafted import pass_count
        from optc.hub import local_model

        if Path(model).is_dir():
            import_transformers()
        steps = pass_count(resolve_for(local_model(model), request))
        update(0, "capture", total=steps + 1)
        result = compile(model, request=request, progress=update)
    emit(result.to_dict(), as_json, _show)


def _show(result: dict[str, Any]) -> None:
    table = Table(box=None, header_style="bold")
    titles, cells = drift_table(result["passes"])
    for title in ("pass", "matched", "seconds", *titles):
        table.add_column(title, justify="left" if title == "pass" else "right")
    program = "model"
    for row, drift in zip(result["passes"], cells, strict=True):
        matched = f"{row['matched']} of {row['candidates']}"
        if row["program"] != program:
            program = row["program"]
            table.add_row(f"{program}:" if program != "model" else "decoder:")
        table.add_row(row["name"], matched, f"{row['seconds']:.2f}", *drift)
    console = stderr(_TABLE_WIDTH)
    console.print(table)
    for note in result["capture"]["notes"]:
        console.print(printable(f"  capture: {note}"), markup=False)
    for row in result["passes"]:
        for note in row["notes"]:
            title = pass_title(row["name"], row["program"])
            console.print(printable(f"  {title}: {note}"), markup=False)
    for note in result["notes"]:
        console.print(printable(f"  export: {note}"), markup=False)
    quantized = result["quantization"]
    if "bits_per_parameter" in quantized:
        bits, ideal = quantized["bits_per_parameter"], quantized["ideal_bits"]
        console.print(
            f"  quantized weights: {group_text(quantized['group_size'])}; {bits:.3f} bits per parameter, ideal {ideal:.3f}",
            markup=False,
        )
    say(f"{result['artifact']}: {result['target']}, {result['seconds']:.1f} s; weights {Sizes.read(result['sizes'])}")
