"""`optc eval`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from optc.cli.common import emit, json_option, progress
from optc.cli.session_options import artifact_argument, save_figures, save_option, session_options
from optc.compiler.diagnostics import InputError, UsageError


@click.command(name="eval")
@artifact_argument
@click.option("--text", required=True, type=click.Path(path_type=Path), help="Text file, UTF-8.")
@click.option("--windows", type=int, help="Evaluate only the first so many windows of 1024 tokens.")
@click.option(
    "--source", type=click.Path(path_type=Path), metavar="DIR",
    help="Model folder to compare with (default: the one that was compiled).",
)  # fmt: skip
@click.option(
    "--no-reference", is_flag=True, help="Only the artifact's own perplexity, without the source model."
)
@save_option
@session_options
@json_option
def evaluate(artifact: Path, text: Path, as_json: bool, **flags: Any) -> None:
    """Perplexity of ARTIFACT on a text, and KL and top-1 agreement against its source model.

    The text is encoded once; each window of 1024 tokens predicts 1024 tokens. KL(source || artifact)
    is in nats per token; the source runs in fp32 with transformers.

    \b
    optc eval out/fiction-onnx --text book.txt
    optc eval out/fiction-onnx --text book.txt --windows 16 --json
    optc eval out/fiction-onnx --text book.txt --source examples/fiction-3m
    """
    from optc.runtime.evaluate import evaluate as measure
    from optc.runtime.load import load
    from optc.runtime.reference import open_reference

    source: Path | None = flags["source"]
    if flags["no_reference"] and source is not None:
        raise UsageError("--source and --no-reference contradict each other", remedy="give one of them")
    content = _read(text)
    model = load(artifact, threads=flags["threads"], num_blocks=flags["kv_blocks"])
    tokens = model.encode(content)
    reference = None if flags["no_reference"] else open_reference(model.manifest, source)
    with progress("windows") as update:
        found = measure(
            model.session, tokens, reference, windows=flags["windows"],
            on_window=lambda done, total: update(done, f"{done} of {total}"),
        )  # fmt: skip
    model.close()
    result: dict[str, Any] = asdict(found) | {
        "source": None if reference is None else str(reference.path),
        "source_matches": None if reference is None else reference.matches,
    }
    if flags["save"]:
        save_figures(artifact, quality=result | {"text": text.name})
    emit(result, as_json, _show)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(
            "the text cannot be read", where=str(path), why=str(error), remedy="give a text file"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(
            "the text is not UTF-8", where=str(path), why=str(error), remedy="convert it first"
        ) from error


def _show(result: dict[str, Any]) -> None:
    interval = result["perplexity_ci95"]
    spread = "" if interval is None else f"  (95 %: {interval[0]:.3f} to {interval[1]:.3f})"
    click.echo(
        f"tokens               {result['tokens']} in {result['windows']} window(s) of {result['window']}"
    )
    click.echo(f"perplexity           {result['perplexity']:.4f}{spread}")
    if result["kl"] is not None:
        click.echo(f"reference perplexity {result['reference_perplexity']:.4f}  ({result['source']})")
        click.echo(f"KL(source||artifact) {result['kl']:.3e} nats per token")
        click.echo(f"top-1 agreement      {100 * result['top1_agreement']:.2f} %")
