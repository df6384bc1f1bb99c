"""`optc compile`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.table import Table

from optc.cli.common import F, emit, json_option, progress, stderr
from optc.cli.options import compile_flags, merge_recipe, require, to_settings

_RUN_FLAGS: tuple[Callable[[F], F], ...] = (
    click.option("-o", "--output", type=click.Path(path_type=Path), help="Folder of the artifact."),
    click.option("--force", is_flag=True, help="Replace an existing artifact."),
    click.option("--allow-noop", is_flag=True, help="Let a requested pass match nothing."),
    click.option("--dump-ir", type=click.Path(path_type=Path), help="Write every stage's IR to this folder."),
    click.option("--work-dir", type=click.Path(path_type=Path), help="Keep finished stages here; a rerun continues."),
    click.option("--text", type=click.Path(path_type=Path), help="Text for the numerics gate (default: a built-in page)."),
    click.option("--max-kl", type=float, help="Gate: largest KL a lossy pass may cause, nats per token."),
    click.option("--min-top1", type=float, help="Gate: smallest top-1 agreement after a lossy pass."),
    click.option("--max-perplexity-increase", type=float, help="Gate: largest relative rise, e.g. 0.1."),
    click.option("--seed", type=int, help="Seed of the gate's random tokens."),
    click.option("--trust-remote-code", is_flag=True, help="Allow code that comes with the model to run."),
    json_option,
)  # fmt: skip


def run_flags(command: F) -> F:
    """Add the flags of a command that compiles: where to, and how it is watched."""
    for flag in reversed(_RUN_FLAGS):
        command = flag(command)
    return command


@click.command(name="compile")
@click.argument("model", required=False)
@compile_flags
@run_flags
def compile_(as_json: bool, **flags: Any) -> None:
    """Compile MODEL (a Hugging Face folder) for a target.

    After each pass the program is run and compared with the stage before; a miss names the pass and
    exits with 5, a requested pass that matches nothing with 6.

    \b
    optc compile examples/fiction-3m --target onnx-cpu --quant rtn -o out/fiction-onnx
    optc compile examples/fiction-3m --target inductor-cpu -o out/fiction-pt2
    optc compile --recipe recipe.yaml --force
    """
    merged = merge_recipe(flags)
    require(merged, "model", "optc compile MODEL --target onnx-cpu -o OUT")
    require(merged, "target", "--target onnx-cpu (see optc targets)")
    run_compile(merged, as_json, "compiling")


def run_compile(merged: dict[str, Any], as_json: bool, doing: str) -> None:
    """Compile by merged flags that name a model and a target, and print the result."""
    from optc.api import check_request, compile, recipe_steps
    from optc.targets import find_target

    output = require(merged, "output", "-o OUT")
    settings = to_settings(merged)
    found = find_target(merged["target"])
    check_request(found, settings.options)
    steps = len(recipe_steps(found, "decoder", settings))
    with progress(f"{doing} for {found.name}", total=steps + 1) as update:
        result = compile(
            merged["model"], target=found.name, output=output, settings=to_settings(merged, progress=update)
        )
    emit(result.to_dict(), as_json, _show)


def _show(result: dict[str, Any]) -> None:
    table = Table(box=None, header_style="bold")
    for title in ("pass", "matched", "seconds", "max |diff|", "KL", "top-1"):
        table.add_column(title, justify="left" if title == "pass" else "right")
    for row in result["passes"]:
        table.add_row(
            row["name"], f"{row['matched']} of {row['candidates']}", f"{row['seconds']:.2f}",
            _number(row["max_abs_diff"], "{:.1e}"), _number(row["kl"], "{:.1e}"), _number(row["top1_agreement"], "{:.1%}"),
        )  # fmt: skip
    console = stderr()
    console.print(table)
    for row in result["passes"]:
        for note in row["notes"]:
            console.print(f"  {row['name']}: {note}", markup=False)
    size, quantized = result["weight_bytes"] / 1e6, result["quantization"]
    if "bits_per_parameter" in quantized:
        bits, ideal = quantized["bits_per_parameter"], quantized["ideal_bits"]
        console.print(f"  quantized weights: {bits:.3f} bits per parameter, ideal {ideal:.3f}", markup=False)
    click.echo(
        f"{result['artifact']}: {result['target']}, {size:.1f} MB of weights, {result['seconds']:.1f} s"
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)
