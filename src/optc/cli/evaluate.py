"""`optc eval`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from optc.cli.common import emit, json_option, progress
from optc.cli.session_options import device_option, save_figures, save_option, session_options
from optc.compiler.artifact.engines import find_engine
from optc.compiler.diagnostics import InputError, UsageError
from optc.compiler.ir.devices import choose_device

if TYPE_CHECKING:
    from optc.runtime.sessions.load import Model


@click.command(name="eval")
@click.argument("artifacts", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="ARTIFACT...")
@click.option("--compare", "comparing", is_flag=True, help="Several artifacts on the same text: one table.")
@click.option("--text", type=click.Path(path_type=Path), help="Text file, UTF-8.")
@click.option("--windows", type=int, help="Evaluate at most this many windows of 1024 tokens.")
@click.option(
    "--top-k",
    type=int,
    metavar="K",
    help="Also report the KL over the source's K most likely tokens, with all others as one event.",
)
@click.option(
    "--source",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Model folder to compare with (default: the one that was compiled).",
)
@click.option("--no-reference", is_flag=True, help="Only the artifact's own perplexity, without the source model.")
@click.option(
    "--tasks",
    multiple=True,
    metavar="NAME|PATH",
    help="Run a task of lm-eval (repeatable, or comma-separated): a name, a YAML file, or a folder of them.",
)
@click.option("--num-fewshot", type=int, help="With --tasks: examples in the prompt (default: what the task says).")
@click.option("--limit", type=int, help="With --tasks: use at most this many examples of each.")
@save_option
@session_options
@device_option("Where the source model runs, and a model folder without an engine.  [default: cpu]")
@json_option
def evaluate(artifacts: tuple[Path, ...], as_json: bool, **flags: Any) -> None:
    """Perplexity of ARTIFACT on a text, KL and top-1 agreement against its source model; tasks of lm-eval.

    The text is encoded once; each window of 1024 tokens predicts 1024 tokens. KL(source || artifact)
    is in nats per token; the source runs in fp32 with transformers. With --compare, artifacts of one
    source see the same windows, and differences in log-likelihood come with paired 95 % intervals.

    \b
    optc eval out/fiction-onnx --text book.txt
    optc eval out/fiction-onnx --text book.txt --windows 16 --top-k 10 --json
    optc eval --compare out/rtn out/gptq out/awq --text book.txt
    optc eval out/fiction-onnx --tasks ./my-tasks
    """
    _check(artifacts, flags)
    if flags["device"] is not None:
        choose_device(flags["device"])
    with ExitStack() as stack:
        models = [_load(path, flags, stack) for path in artifacts]
        _check_device(models, flags)
        rows: list[dict[str, Any]] = [{"artifact": str(path)} for path in artifacts]
        extra: dict[str, Any] = {}
        if flags["text"] is not None:
            extra = _score(artifacts, models, rows, flags)
        names = [name for item in flags["tasks"] for name in item.split(",") if name]
        for model, row in zip(models, rows, strict=True):
            if names:
                row["tasks"] = _run_tasks(model, names, flags)
    if flags["save"]:
        for path, row in zip(artifacts, rows, strict=True):
            save_figures(path, quality={key: value for key, value in row.items() if key != "artifact"})
    if flags["comparing"]:
        emit({"results": rows, **extra}, as_json, _show_table)
    else:
        emit({key: value for key, value in rows[0].items() if key != "artifact"}, as_json, _show)


def _check(artifacts: Sequence[Path], flags: dict[str, Any]) -> None:
    """Refuse contradictions before anything is loaded."""
    if flags["no_reference"] and flags["source"] is not None:
        raise UsageError("--source and --no-reference contradict each other", remedy="give one of them")
    if flags["text"] is None and not flags["tasks"]:
        raise UsageError("there is nothing to evaluate on", remedy="give --text FILE, --tasks NAME, or both")
    if len(artifacts) > 1 and not flags["comparing"]:
        raise UsageError(f"{len(artifacts)} artifacts were given", remedy="add --compare to see them in one table")
    if len(set(artifacts)) < len(artifacts):
        raise UsageError("an artifact was named twice", remedy="name each once")
    idle = [name for name in ("windows", "top_k", "source") if flags[name] is not None]
    if flags["text"] is None and (idle or flags["no_reference"]):
        name = (idle or ["no_reference"])[0].replace("_", "-")
        raise UsageError(f"--{name} has no effect without --text", remedy="add --text FILE")
    for name in ("num_fewshot", "limit"):
        if flags[name] is not None and not flags["tasks"]:
            raise UsageError(f"--{name.replace('_', '-')} has no effect without --tasks", remedy="add --tasks NAME")


def _check_device(models: Sequence[Model], flags: dict[str, Any]) -> None:
    """Refuse --device where nothing runs there: engines have their own."""
    compared = flags["text"] is not None and not flags["no_reference"]
    if flags["device"] and not compared and not any(find_engine(m.manifest.engine, "").eager for m in models):
        raise UsageError(
            "--device has no effect here: no source model is run, and the engines have devices of their own",
            remedy="leave it out",
        )


def _load(path: Path, flags: dict[str, Any], stack: ExitStack) -> Model:
    from optc.runtime.sessions.load import load

    model = load(
        path,
        threads=flags["threads"],
        num_blocks=flags["kv_blocks"],
        eager=True,
        graph_device=flags["device"] or "cpu",
    )
    return stack.enter_context(closing(model))


def _score(
    artifacts: Sequence[Path], models: Sequence[Model], rows: list[dict[str, Any]], flags: dict[str, Any]
) -> dict[str, Any]:
    """Score the text, add each artifact's figures to its row; what concerns all is returned."""
    from optc.runtime.measuring.evaluate import compare
    from optc.runtime.measuring.reference import open_reference

    text = _read(flags["text"])
    tokens = models[0].encode(text)
    for path, model in zip(artifacts[1:], models[1:], strict=True):
        _check_same(artifacts[0], models[0], path, model, model.encode(text) == tokens, flags)
    reference = (
        None if flags["no_reference"] else open_reference(models[0].manifest, flags["source"], flags["device"] or "cpu")
    )
    with progress("windows") as update:
        found = compare(
            [model.session for model in models],
            tokens,
            reference,
            windows=flags["windows"],
            top_k=flags["top_k"],
            on_window=lambda done, total: update(done, f"{done} of {total}"),
        )
    for model, row, evaluation in zip(models, rows, found.evaluations, strict=True):
        row |= asdict(evaluation)
        row["source"] = None if reference is None else str(reference.path)
        row["source_matches"] = (
            None if reference is None else _weights(models[0]) == _weights(model) and reference.matches
        )
        row["text"] = flags["text"].name
    differences = [
        {
            "first": str(artifacts[item.first]),
            "second": str(artifacts[item.second]),
            "log_likelihood": item.log_likelihood,
            "ci95": item.ci95,
        }
        for item in found.differences
    ]
    return {"differences": differences}


def _weights(model: Model) -> str:
    return model.manifest.source.weights_sha256


def _check_same(first: Path, model: Model, path: Path, other: Model, same_tokens: bool, flags: dict[str, Any]) -> None:
    """Refuse artifacts whose figures on one text cannot be compared."""
    pair = f"{first} and {path}"
    if not same_tokens or model.session.vocab_size != other.session.vocab_size:
        raise InputError(
            "the artifacts do not see the same tokens",
            where=pair,
            why="their tokenizers or vocabularies differ",
            remedy="compare artifacts of one model",
        )
    if _weights(model) != _weights(other) and flags["source"] is None and not flags["no_reference"]:
        raise InputError(
            "the artifacts were compiled from different weights",
            where=pair,
            remedy="name the model to compare all of them with: --source DIR, or add --no-reference",
        )


def _run_tasks(model: Model, names: Sequence[str], flags: dict[str, Any]) -> dict[str, Any]:
    from optc.runtime.measuring.tasks import run_tasks

    with progress("requests") as update:
        return run_tasks(
            model,
            names,
            num_fewshot=flags["num_fewshot"],
            limit=flags["limit"],
            on_request=lambda done, total: update(done, f"{done} of {total}"),
        )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(
            "the text cannot be read", where=str(path), why=str(error), remedy="give a text file"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError("the text is not UTF-8", where=str(path), why=str(error), remedy="convert it first") from error


def _show(result: dict[str, Any]) -> None:
    if "perplexity" in result:
        _show_text(result)
    for task, row in result.get("tasks", {}).items():
        for metric, figure in row.items():
            if isinstance(figure, dict):
                click.echo(f"{task:20} {metric} {_figure(figure)}")


def _show_text(result: dict[str, Any]) -> None:
    interval = result["perplexity_ci95"]
    spread = "" if interval is None else f"  (95 %: {interval[0]:.3f} to {interval[1]:.3f})"
    click.echo(f"tokens               {result['tokens']} in {result['windows']} window(s) of {result['window']}")
    click.echo(f"perplexity           {result['perplexity']:.4f}{spread}")
    if result["kl"] is not None:
        click.echo(f"reference perplexity {result['reference_perplexity']:.4f}  ({result['source']})")
        click.echo(f"KL(source||artifact) {result['kl']:.3e} nats per token")
        if result["top_k_kl"] is not None:
            click.echo(f"KL of the top {result['top_k']:<6} {result['top_k_kl']:.3e} nats per token")
        click.echo(f"top-1 agreement      {100 * result['top1_agreement']:.2f} %")


def _figure(figure: dict[str, Any]) -> str:
    value, error = figure["value"], figure["stderr"]
    text = f"{value:.4f}" if isinstance(value, float) else str(value)
    return text if error is None else f"{text} ± {error:.4f}"


def _show_table(result: dict[str, Any]) -> None:
    rows = result["results"]
    first = rows[0]
    if first.get("kl") is not None:
        click.echo(f"reference perplexity {first['reference_perplexity']:.4f}  ({first['source']})")
    against = {item["second"]: item for item in result.get("differences", []) if item["first"] == first["artifact"]}
    table = Table(box=None, header_style="bold")
    columns = {"artifact": [row["artifact"] for row in rows], **_columns(rows)}
    if "perplexity" in first:
        columns["gain (95 %)"] = [_gain(against.get(row["artifact"])) for row in rows]
    for title in columns:
        table.add_column(title, justify="left" if title == "artifact" else "right", no_wrap=True)
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*cells)
    console = Console(width=sum(max(map(len, [title, *cells])) + 3 for title, cells in columns.items()))
    with console.capture() as text:
        console.print(table)
    click.echo("\n".join(line.rstrip() for line in text.get().splitlines()))
    if "perplexity" in first:
        click.echo("gain: log-likelihood per token over the first artifact, nats; paired over windows")


def _columns(rows: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Title -> a cell per artifact."""
    first, columns = rows[0], {}
    forms = {"perplexity": ("perplexity", "{:.4f}")}
    if first.get("kl") is not None:
        forms["KL"] = ("kl", "{:.3e}")
        if first["top_k"] is not None:
            forms[f"top-{first['top_k']} KL"] = ("top_k_kl", "{:.3e}")
        forms["top-1"] = ("top1_agreement", "{:.2%}")
    forms["seconds"] = ("seconds", "{:.1f}")
    if "perplexity" in first:
        columns = {title: [form.format(row[key]) for row in rows] for title, (key, form) in forms.items()}
    for task, found in first.get("tasks", {}).items():
        for metric, figure in found.items():
            if isinstance(figure, dict):
                columns[f"{task} {metric}"] = [_figure(row["tasks"][task][metric]) for row in rows]
    return columns


def _gain(item: dict[str, Any] | None) -> str:
    """A difference in log-likelihood with its interval; "-" for the first artifact."""
    if item is None:
        return "-"
    text = f"{item['log_likelihood']:+.5f}"
    return text if item["ci95"] is None else f"{text} ({item['ci95'][0]:+.5f} to {item['ci95'][1]:+.5f})"
