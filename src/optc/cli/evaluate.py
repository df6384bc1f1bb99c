"""`optc eval`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
from msgspec import Meta

from optc.cli.common import emit, json_option, read_text, say
from optc.cli.eval_tables import show_one, show_table
from optc.cli.options import struct_flags
from optc.cli.own_process import leave_to_own_process
from optc.cli.session_options import Save, SessionOptions, save_figures
from optc.cli.tensors import Inputs, evaluate_tensors, refuse_inputs, show_quality, takes_tensors
from optc.compiler.artifact.engines import find_engine
from optc.compiler.artifact.folder import read_manifest
from optc.compiler.diagnostics import InputError, TargetError, UsageError
from optc.compiler.settings.device import DeviceName
from optc.progress import part, progress
from optc.runtime.bounds import Count, CountOrZero

if TYPE_CHECKING:
    from optc.runtime.sessions.text_model import Model


class EvalOptions(SessionOptions, frozen=True, kw_only=True):
    """What is evaluated, on what, against what."""

    compare: Annotated[bool, Meta(description="Several artifacts on the same text: one table.")] = False
    text: Annotated[Path, Meta(description="Text file, UTF-8.")] | None = None
    inputs: Inputs | None = None
    windows: Annotated[Count, Meta(description="Evaluate at most this many windows of 1024 tokens.")] | None = None
    top_k: (
        Annotated[
            Count,
            Meta(
                description="Also report the KL over the source's K most likely tokens, with all others as one event.",
                extra={"metavar": "K"},
            ),
        ]
        | None
    ) = None
    source: (
        Annotated[
            Path,
            Meta(
                description="Model folder to compare with.",
                extra={"metavar": "DIR", "default": "the one that was compiled"},
            ),
        ]
        | None
    ) = None
    no_reference: Annotated[bool, Meta(description="Only the artifact's own perplexity, without the source model.")] = (
        False
    )
    tasks: Annotated[
        tuple[str, ...],
        Meta(
            description="Run a task of lm-eval (repeatable, or comma-separated): a name, a YAML file, or a folder.",
            extra={"metavar": "NAME|PATH"},
        ),
    ] = ()
    num_fewshot: (
        Annotated[
            CountOrZero,
            Meta(
                description="With --tasks: examples in the prompt.",
                extra={"default": "what the task says"},
            ),
        ]
        | None
    ) = None
    limit: Annotated[Count, Meta(description="With --tasks: use at most this many examples of each.")] | None = None
    save: Save = False
    device: (
        Annotated[
            DeviceName,
            Meta(
                description="Where the source model runs, and a model folder without an engine.",
                extra={"default": "cpu"},
            ),
        ]
        | None
    ) = None


@click.command(name="eval")
@click.argument("artifacts", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="ARTIFACT...")
@struct_flags(EvalOptions)
@json_option
def evaluate(artifacts: tuple[Path, ...], as_json: bool, options: EvalOptions) -> None:
    """Perplexity of ARTIFACT on a text, KL and top-1 agreement against its source model; tasks of lm-eval.

    An encoder or a module is compared on --inputs (an encoder on each line of --text as well) with its source model,
    or with the first artifact of --compare; `labels` among the inputs give the accuracy.

    The text is encoded once; each window of 1024 tokens predicts 1024 tokens. KL(source || artifact)
    is in nats per token; the source runs in fp32 with transformers. With --compare, artifacts of one
    source see the same windows, and differences in log-likelihood come with paired 95 % intervals.

    \b
    optc eval out/fiction-onnx --text book.txt
    optc eval out/fiction-onnx --text book.txt --windows 16 --top-k 10 --json
    optc eval --compare out/rtn out/gptq out/awq --text book.txt
    optc eval out/fiction-onnx --tasks ./my-tasks
    optc eval --compare out/resnet out/resnet-int8 --inputs images/
    """
    _check(artifacts, options)
    leave_to_own_process(artifacts)
    with progress("evaluating"):
        result = evaluation(artifacts, options)
    tensors = takes_tensors(artifacts[0])
    emit(result, as_json, show_quality if tensors else show_table if options.compare else show_one)


def evaluation(artifacts: tuple[Path, ...], options: EvalOptions) -> dict[str, Any]:
    """What `optc eval` prints: the figures of one artifact, or of several under `results`.

    Raises:
        OptcError: options that contradict each other, artifacts that do not run or are of different models.
    """
    _check(artifacts, options)
    kinds = {takes_tensors(path) for path in artifacts}
    if len(kinds) > 1:
        raise InputError("some artifacts generate text, some do not", remedy="compare artifacts of one model")
    if kinds == {True}:
        return evaluate_tensors(artifacts, options)
    refuse_inputs(options, artifacts[0])
    if options.device is not None:
        from optc.compiler.ir.devices import choose_device

        choose_device(options.device)
    with ExitStack() as stack:
        models = [_load(path, options, stack) for path in artifacts]
        _check_device(models, options)
        rows: list[dict[str, Any]] = [{"artifact": str(path)} for path in artifacts]
        extra: dict[str, Any] = {}
        if options.text is not None:
            extra = _score(options.text, artifacts, models, rows, options)
        names = [name for item in options.tasks for name in item.split(",") if name]
        for model, row in zip(models, rows, strict=True):
            if names:
                row["tasks"] = _run_tasks(model, names, options)
    if options.save:
        for path, row in zip(artifacts, rows, strict=True):
            save_figures(path, quality={key: value for key, value in row.items() if key != "artifact"})
    if options.compare:
        return {"results": rows, **extra}
    return {key: value for key, value in rows[0].items() if key != "artifact"}


def _check(artifacts: Sequence[Path], options: EvalOptions) -> None:
    """Refuse contradictions before anything is loaded."""
    if options.no_reference and options.source is not None:
        raise UsageError("--source and --no-reference contradict each other", remedy="give one of them")
    if options.text is None and not options.tasks and options.inputs is None:
        raise UsageError("there is nothing to evaluate on", remedy="give --text FILE, --tasks NAME, or both")
    if len(artifacts) > 1 and not options.compare:
        raise UsageError(f"{len(artifacts)} artifacts were given", remedy="add --compare to see them in one table")
    if len(set(artifacts)) < len(artifacts):
        raise UsageError("an artifact was named twice", remedy="name each once")
    idle = [name for name in ("windows", "top_k", "source") if getattr(options, name) is not None]
    if options.text is None and options.inputs is None and (idle or options.no_reference):
        name = (idle or ["no_reference"])[0].replace("_", "-")
        raise UsageError(f"--{name} has no effect without --text", remedy="add --text FILE")
    for name in ("num_fewshot", "limit"):
        if getattr(options, name) is not None and not options.tasks:
            raise UsageError(f"--{name.replace('_', '-')} has no effect without --tasks", remedy="add --tasks NAME")


def _check_device(models: Sequence[Model], options: EvalOptions) -> None:
    """Refuse --device where nothing runs there: engines have their own."""
    compared = options.text is not None and not options.no_reference
    if options.device and not compared and not any(find_engine(m.manifest.engine, "").eager for m in models):
        raise UsageError(
            "--device has no effect here: no source model is run, and the engines have devices of their own",
            remedy="leave it out",
        )


def _load(path: Path, options: EvalOptions, stack: ExitStack) -> Model:
    from optc.runtime.sessions.load import load

    if read_manifest(path).contract.cross is not None:
        raise TargetError(
            "optc eval does not measure encoder-decoder models",
            where=str(path),
            why="perplexity and tasks score a text by itself; their decoder answers what the encoder reads",
            remedy="read what the gate measured with optc inspect (KL and top-1 since the capture), or score answers of "
            "optc run",
        )
    model = load(
        path,
        threads=options.threads,
        num_blocks=options.kv_blocks,
        eager=True,
        graph_device=options.device or "cpu",
        trust=options.trust,
    )
    return stack.enter_context(closing(model))


def _score(
    path: Path, artifacts: Sequence[Path], models: Sequence[Model], rows: list[dict[str, Any]], options: EvalOptions
) -> dict[str, Any]:
    """Score the text, add each artifact's figures to its row; what concerns all is returned."""
    from optc.runtime.measuring.evaluate import compare
    from optc.runtime.measuring.reference import open_reference
    from optc.runtime.measuring.sample import greedy_sample

    text = read_text(path)
    tokens = models[0].encode(text)
    for other, model in zip(artifacts[1:], models[1:], strict=True):
        _check_same(artifacts[0], models[0], other, model, model.encode(text) == tokens, options)
    reference = (
        None if options.no_reference else open_reference(models[0].manifest, options.source, options.device or "cpu")
    )
    with part("windows") as update:
        found = compare(
            [model.session for model in models],
            tokens,
            reference,
            windows=options.windows,
            top_k=options.top_k,
            on_window=lambda done, total: update(done, f"{done} of {total}"),
        )
    for model, row, evaluation in zip(models, rows, found.evaluations, strict=True):
        row |= asdict(evaluation)
        row["source"] = None if reference is None else str(reference.path)
        row["source_matches"] = (
            None if reference is None else _weights(models[0]) == _weights(model) and reference.matches
        )
        row["text"] = path.name
        if options.save:
            row["sample"] = asdict(greedy_sample(model, tokens, reference))
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


def _check_same(first: Path, model: Model, path: Path, other: Model, same_tokens: bool, options: EvalOptions) -> None:
    """Refuse artifacts whose figures on one text cannot be compared."""
    pair = f"{first} and {path}"
    if not same_tokens or model.session.vocab_size != other.session.vocab_size:
        raise InputError(
            "the artifacts do not see the same tokens",
            where=pair,
            why="their tokenizers or vocabularies differ",
            remedy="compare artifacts of one model",
        )
    if _weights(model) != _weights(other) and options.source is None and not options.no_reference:
        raise InputError(
            "the artifacts were compiled from different weights",
            where=pair,
            remedy="name the model to compare all of them with: --source DIR, or add --no-reference",
        )


def _run_tasks(model: Model, names: Sequence[str], options: EvalOptions) -> dict[str, Any]:
    from optc.runtime.measuring.task_code import named_code
    from optc.runtime.measuring.tasks import run_tasks

    for code in named_code(Path(name) for name in names if Path(name).exists()):
        say(f"the task runs code: {code}", err=True, fg="yellow")
    with part("requests") as update:
        return run_tasks(
            model,
            names,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
            on_request=lambda done, total: update(done, f"{done} of {total}"),
        )
