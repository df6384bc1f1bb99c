"""`optc search`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import click
import msgspec
from msgspec import Meta
from rich.table import Table

from optc.cli.common import emit, json_option, say
from optc.cli.compare import rendered
from optc.cli.options import GroupedCommand, struct_flags
from optc.cli.request_flags import merge_recipe, request_flags, request_of, require
from optc.compiler.artifact.sizes import megabytes
from optc.compiler.diagnostics import UsageError, printable
from optc.progress import progress
from optc.runtime.bounds import Count, CountOrZero


def _names(value: Any) -> tuple[str, ...]:
    """Names: "rtn,gptq"."""
    found = tuple(item.strip() for item in value.split(",")) if isinstance(value, str) else ()
    if not found or not all(found):
        raise TypeError
    return found


def _counts(value: Any) -> tuple[int, ...]:
    """Bits: "4,8"."""
    found = tuple(int(item) for item in _names(value))
    if not all(2 <= item <= 8 for item in found):
        raise ValueError
    return found


class SearchOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What is tried, and what it must keep to."""

    output: Annotated[Path, Meta(description="Folder of the search.", extra={"short": "-o"})]
    text: Annotated[Path, Meta(description="Text on which the loss is measured, UTF-8.")]
    methods: Annotated[
        tuple[str, ...],
        Meta(
            description="Quantization methods to try.",
            extra={
                "read": _names,
                "joined": True,
                "metavar": "NAME,NAME",
                "default": "all that the target takes",
                "expected": "names of methods with commas (see optc targets)",
            },
        ),
    ] = ()
    bits: Annotated[
        tuple[int, ...],
        Meta(
            description="Bits to try, of methods that have none of their own.",
            extra={"read": _counts, "joined": True, "metavar": "N,N", "expected": "numbers from 2 to 8 with commas"},
        ),
    ] = (4, 8)
    max_loss: (
        Annotated[float, Meta(ge=0, description="Largest rise of the perplexity over the source's: 0.02 is 2 %.")]
        | None
    ) = None
    max_size: Annotated[float, Meta(gt=0, description="Largest size of the weights, in MB.")] | None = None
    windows: Annotated[Count, Meta(description="Read at most this many windows of 1024 tokens.")] | None = None
    samples: Annotated[
        CountOrZero, Meta(description="Timed generations of each try, in turn with the plain compile; 0: no speed.")
    ] = 5
    keep_all: Annotated[bool, Meta(description="Keep the artifacts of all tries, not of the best alone.")] = False


@click.command(cls=GroupedCommand)
@click.argument("model", required=False)
@struct_flags(SearchOptions)
@request_flags(
    ("what", "quantization", "cache", "calibration", "gate"),
    leave_out=("quant", "bits", "average_bits", "passes", "text"),
)
@json_option
def search(as_json: bool, options: SearchOptions, **flags: Any) -> None:
    """Try quantization methods and bits on MODEL, a decoder, and show the best trade-offs of size, loss and speed.

    Each try is compiled under the numerics gate, scored on the text beside the source, and timed in turn with the plain
    compile. Those that no other beats stay in the output folder as artifacts. Run it again to go on with a search that
    was stopped.

    \b
    optc search examples/fiction-3m --target onnx-cpu --text book.txt -o out/search
    optc search examples/fiction-3m --target onnx-cpu --text book.txt -o out/search --max-loss 0.05 --max-size 3
    """
    merged = merge_recipe(flags)
    model = require(merged, "model", "optc search MODEL --target onnx-cpu --text FILE -o OUT")
    target = require(merged, "target", "--target onnx-cpu (see optc targets)")
    if {"quant", "passes", "output"} & merged.keys():
        raise UsageError("the recipe names a method, passes or an output", remedy="leave them to the search")
    with progress("searching") as update:
        from optc.searching import Limits
        from optc.searching import search as run

        result = run(
            model,
            request_of(merged, target),
            options.output,
            options.text,
            methods=options.methods,
            bits=options.bits,
            limits=Limits(max_loss=options.max_loss, max_size=options.max_size),
            windows=options.windows,
            samples=options.samples,
            keep_all=options.keep_all,
            progress=update,
        )
    emit(result | {"output": str(options.output)}, as_json, _show)


_COLUMNS = ("", "try", "weights", "perplexity", "loss", "KL", "decode, tokens/s", "over plain", "compile, s")


def _show(result: dict[str, Any]) -> None:
    table = Table(box=None, header_style="bold")
    for title in _COLUMNS:
        table.add_column(title, justify="left" if title in ("", "try") else "right", no_wrap=True)
    for row in result["tried"]:
        if row["outcome"] == "made":
            table.add_row("*" if row["name"] in result["front"] else "", row["name"], *_cells(row))
    say(rendered(table, 160))
    for row in result["tried"]:
        if row["outcome"] != "made":
            say(printable(f"  {row['name']}: {row['outcome']}: {row['why']}"))
    best = ", ".join(f"{result['output']}/{name}" for name in result["front"])
    say(f"* best within the limits: {best}" if best else "nothing keeps to the limits: raise --max-loss or --max-size")


def _cells(row: dict[str, Any]) -> list[str]:
    forms = (
        ("perplexity", "{:.3f}"),
        ("loss", "{:+.2%}"),
        ("kl", "{:.2e}"),
        ("decode", "{:.0f}"),
        ("speed", "{:.2f} x"),
    )
    figures = ["-" if row[name] is None else form.format(row[name]) for name, form in forms]
    return [megabytes(row["size"]), *figures, f"{row['seconds']:.1f}"]
