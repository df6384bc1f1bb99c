"""`optc compare`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Annotated, Any

import click
import msgspec
from msgspec import Meta
from rich.console import Console
from rich.table import Table

from optc.cli.common import emit, json_option, say
from optc.cli.evaluate import EvalOptions, evaluation
from optc.cli.options import struct_flags
from optc.cli.own_process import leave_to_own_process
from optc.cli.session_options import SessionOptions
from optc.cli.tensors import Inputs, load_for, takes_tensors
from optc.compiler.artifact.drift_table import EMPTY
from optc.compiler.artifact.engines import find_engine
from optc.compiler.artifact.folder import read_manifest
from optc.compiler.artifact.manifest import Manifest
from optc.compiler.artifact.sizes import megabytes
from optc.compiler.diagnostics import InputError, UsageError, printable
from optc.progress import part, progress
from optc.runtime.bounds import Count, Samples, TimedTokens

LABELS = {
    "decode_tokens_per_s": "decode, tokens/s",
    "prefill_tokens_per_s": "prefill, tokens/s",
    "rows_per_s": "rows/s",
}
"""What is timed, for people."""


class CompareOptions(SessionOptions, frozen=True, kw_only=True):
    """What is measured of all artifacts, and where the report goes."""

    output: Annotated[Path, Meta(description="Write an HTML report here.", extra={"short": "-o"})] | None = None
    force: Annotated[bool, Meta(description="Replace an existing report.")] = False
    text: Annotated[Path, Meta(description="Measure the quality on this text file, UTF-8.")] | None = None
    inputs: Inputs | None = None
    windows: Annotated[Count, Meta(description="With --text: at most this many windows of 1024 tokens.")] | None = None
    samples: Annotated[Samples, Meta(description="Timed runs of each artifact, in turn.")] = 5
    no_speed: Annotated[bool, Meta(description="Do not measure the speed.")] = False
    prompt_length: (
        Annotated[
            Count,
            Meta(
                description="Prompt tokens of a timed generation.", extra={"default": "128, or what the context holds"}
            ),
        ]
        | None
    ) = None
    new_tokens: Annotated[TimedTokens, Meta(description="Tokens to generate in it.")] = 32


@click.command()
@click.argument("artifacts", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="ARTIFACT...")
@struct_flags(CompareOptions)
@json_option
def compare(artifacts: tuple[Path, ...], as_json: bool, options: CompareOptions) -> None:
    """Artifacts of one model side by side: sizes, gates, quality on --text or --inputs, speed.

    All see the same windows of the text, and are timed in turn; differences and ratios are to the first artifact, of
    pairs, with 95 % intervals. Artifacts of different sources are refused.

    \b
    optc compare out/rtn out/gptq --text book.txt -o report.html
    optc compare out/resnet out/resnet-int8 --inputs images/ --samples 50
    """
    leave_to_own_process(artifacts)
    with progress("comparing"):
        result = comparison(artifacts, options)
    if options.output is not None:
        from optc.exporters.reports.comparison import write_comparison

        write_comparison(options.output, result, table_rows(result))
        say(f"report: {options.output}", err=True)
    emit(result, as_json, _show)


def comparison(artifacts: Sequence[Path], options: CompareOptions) -> dict[str, Any]:
    """What `optc compare` prints: `artifacts`, a dict for each, and `differences` in log-likelihood of all pairs.

    Raises:
        UsageError: fewer than two artifacts, or one twice. InputError: artifacts of different sources, a report that
            exists. OptcError: as evaluating and running them.
    """
    if len(artifacts) < 2 or len({path.resolve() for path in artifacts}) < len(artifacts):
        raise UsageError("at least two different artifacts are compared", remedy="optc compare ARTIFACT ARTIFACT ...")
    if options.output is not None and options.output.exists() and not options.force:
        raise InputError("the report exists already", where=str(options.output), remedy="use --force, or another name")
    manifests = [read_manifest(path) for path in artifacts]
    _check_one_source(artifacts, manifests)
    rows = [_figures(path, manifest) for path, manifest in zip(artifacts, manifests, strict=True)]
    differences: list[dict[str, Any]] = []
    if options.text is not None or options.inputs is not None:
        found = evaluation(tuple(artifacts), _eval_options(options))
        differences = found.get("differences", [])
        for row, quality in zip(rows, found["results"], strict=True):
            row["quality"] = {key: value for key, value in quality.items() if key != "artifact"}
    if not options.no_speed:
        for row, speed in zip(rows, _speeds(artifacts, manifests, options), strict=True):
            row["speed"] = speed
    source = manifests[0].source
    return {
        "source": {"path": source.path, "weights_sha256": source.weights_sha256, "parameters": source.parameters},
        "artifacts": rows,
        "differences": differences,
    }


def _eval_options(options: CompareOptions) -> EvalOptions:
    given = {name: getattr(options, name) for name in ("text", "inputs", "windows", "threads", "kv_blocks", "trust")}
    return EvalOptions(compare=True, **given)


def _check_one_source(artifacts: Sequence[Path], manifests: Sequence[Manifest]) -> None:
    """Refuse artifacts that were not compiled from the same weights, or, of modules in memory, for the same calls."""
    first = manifests[0]
    for path, other in zip(artifacts[1:], manifests[1:], strict=True):
        pair = f"{artifacts[0]} and {path}"
        if first.source.weights_sha256 != other.source.weights_sha256:
            raise InputError(
                "the artifacts were compiled from different weights",
                where=pair,
                remedy="compare artifacts of one model; optc eval --compare --source takes those of several",
            )
        if takes_tensors(artifacts[0]) != takes_tensors(path):
            raise InputError(
                "some artifacts generate text, some do not", where=pair, remedy="compare those of one model"
            )


def _figures(path: Path, manifest: Manifest) -> dict[str, Any]:
    """What the manifest says of an artifact."""
    total = next((row.since_capture for row in reversed(manifest.passes) if row.since_capture is not None), None)
    return {
        "artifact": str(path),
        "target": manifest.target,
        "dtype": manifest.dtype,
        "created": manifest.created,
        "quantization": manifest.quantization,
        "sizes": None if manifest.sizes is None else manifest.sizes.to_dict(),
        "weight_bytes": manifest.weight_bytes,
        "compile_s": manifest.seconds.get("total"),
        "gate": None if total is None else msgspec.to_builtins(total),
        "limits": manifest.limits,
        "quality": None,
        "speed": None,
    }


def _speeds(
    artifacts: Sequence[Path], manifests: Sequence[Manifest], options: CompareOptions
) -> list[dict[str, Any] | None]:
    """Speeds in turn; None for each artifact where one of them has no engine here."""
    from optc.runtime.measuring import paired_speed

    if any(find_engine(manifest.engine, "").eager for manifest in manifests):
        return [None] * len(artifacts)
    with ExitStack() as stack:
        if takes_tensors(artifacts[0]):
            runs = _calls(artifacts, options)
        else:
            runs = _generations(artifacts, options, stack)
        with part("samples") as update:
            found = paired_speed.speeds_in_turn(
                runs, options.samples, on_sample=lambda done, total: update(done, f"{done} of {total}")
            )
    return [item.to_dict() | {"samples": options.samples} for item in found]


def _generations(artifacts: Sequence[Path], options: CompareOptions, stack: ExitStack) -> list[Any]:
    from optc.runtime.measuring.paired_speed import generating
    from optc.runtime.sessions.load import load

    models = [
        stack.enter_context(
            closing(load(path, threads=options.threads, num_blocks=options.kv_blocks, trust=options.trust))
        )
        for path in artifacts
    ]
    room = min(model.session.context_length for model in models) - options.new_tokens
    length = options.prompt_length or max(1, min(128, room))
    if length > room:
        raise UsageError(
            f"{length} prompt and {options.new_tokens} new tokens do not fit the shortest context",
            remedy="use a smaller --prompt-length or --new-tokens",
        )
    return [generating(model.session, length, options.new_tokens) for model in models]


def _calls(artifacts: Sequence[Path], options: CompareOptions) -> list[Any]:
    from optc.runtime.measuring.paired_speed import calling
    from optc.runtime.measuring.tensors import random_inputs, read_batches

    models = [load_for(path, options) for path in artifacts]
    contract = models[0].manifest.contract
    if options.inputs is not None:
        inputs = read_batches(options.inputs, contract, artifacts[0])[0].inputs
    else:
        inputs = random_inputs(contract, 1, options.prompt_length or min(128, contract.model.context_length or 128))
    rows = int(next(iter(inputs.values())).shape[0]) if inputs and next(iter(inputs.values())).ndim else 1
    return [calling(functools.partial(model.run, inputs), rows) for model in models]


def _show(result: dict[str, Any]) -> None:
    """A row for each artifact."""
    rows = table_rows(result)
    table = Table(box=None, header_style="bold")
    for title in rows[0]:
        table.add_column(title, justify="left" if title == "artifact" else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(printable, row.values()))
    width = sum(max(len(row[title]) for row in [*rows, {title: title}]) + 3 for title in rows[0])
    say(rendered(table, width))
    if len(rows[0]) > 3:
        say("differences and ratios are to the first artifact, of pairs, with 95 % intervals")


def rendered(table: Table, width: int) -> str:
    """A table as lines, which no terminal's width breaks."""
    console = Console(width=width)
    with console.capture() as text:
        console.print(table)
    return "\n".join(line.rstrip() for line in text.get().splitlines())


def table_rows(result: dict[str, Any]) -> list[dict[str, str]]:
    """Title -> cell of each artifact, for people."""
    found = result["artifacts"]
    against = {item["second"]: item for item in result["differences"] if item["first"] == found[0]["artifact"]}
    rows: list[dict[str, str]] = [
        {
            "artifact": row["artifact"],
            "quantization": quantization_text(row),
            "weights": f"{megabytes(row['weight_bytes'])} ({row['weight_bytes'] / (found[0]['weight_bytes'] or 1):.2f} x)",
            **_gate_cells(row["gate"]),
            **_quality_cells(row["quality"], against.get(row["artifact"])),
            **_speed_cells(row["speed"]),
        }
        for row in found
    ]
    titles = dict.fromkeys(title for row in rows for title in row)
    return [{title: row.get(title, EMPTY) for title in titles} for row in rows]


def quantization_text(row: dict[str, Any]) -> str:
    """The method and bits of an artifact, or its type."""
    chosen = row["quantization"]
    if not chosen:
        return str(row["dtype"])
    bits = chosen["bits"] if isinstance(chosen["bits"], list | tuple) else [chosen["bits"]]
    return f"{chosen['method']} {'/'.join(map(str, bits))}"


def _gate_cells(gate: dict[str, Any] | None) -> dict[str, str]:
    if gate is None:
        return {}
    if gate["kl"] is not None:
        return {"gate KL": f"{gate['kl']:.2e}"}
    return {} if gate["relative_error"] is None else {"gate error": f"{gate['relative_error']:.2e}"}


def _quality_cells(quality: dict[str, Any] | None, gain: dict[str, Any] | None) -> dict[str, str]:
    if quality is None:
        return {}
    if "perplexity" in quality:
        cells = {"perplexity": f"{quality['perplexity']:.4f}"}
        if quality["kl"] is not None:
            cells |= {"KL": f"{quality['kl']:.2e}", "top-1": f"{quality['top1_agreement']:.2%}"}
        return cells | {"gain": "-" if gain is None else _within(gain["log_likelihood"], gain["ci95"], "{:+.4f}")}
    forms = {"relative_error": "{:.2e}", "cosine": "{:.5f}", "kl": "{:.2e}", "top1": "{:.2%}", "accuracy": "{:.2%}"}
    return {
        name.replace("_", " "): form.format(quality[name])
        for name, form in forms.items()
        if quality.get(name) is not None
    }


def _speed_cells(speed: dict[str, Any] | None) -> dict[str, str]:
    cells = {}
    for name, title in LABELS.items():
        if speed is not None and name in speed:
            cells[title] = f"{speed[name]['median']:.1f}"
            ratio = speed[name]["to_first"]
            cells[f"ratio of {title.partition(',')[0]}"] = _within(ratio["median"], ratio["ci95"], "{:.2f}")
    return cells


def _within(value: float, interval: Sequence[float] | None, form: str) -> str:
    text = form.format(value)
    return text if interval is None else f"{text} ({form.format(interval[0])} to {form.format(interval[1])})"
