"""`optc run`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import msgspec
from msgspec import Meta

from optc.cli.common import emit, json_option, say, stderr
from optc.cli.embed import refuse_embedding, run_embed
from optc.cli.options import struct_flags
from optc.cli.own_process import leave_to_own_process
from optc.cli.session_options import (
    GeneratingOptions,
    SamplingOptions,
    SessionOptions,
    artifact_argument,
    kv_pool,
    sampling_of,
)
from optc.cli.tensors import Inputs, read_sounds, refuse_inputs, run_tensors, takes_tensors
from optc.compiler.diagnostics import UsageError
from optc.runtime.bounds import Beams, Count, LengthPenalty

if TYPE_CHECKING:
    from optc.runtime.serving.paged_engine import PagedEngine
    from optc.runtime.sessions.text_model import Model


_OF_A_SESSION = tuple(field.name for field in msgspec.structs.fields(SessionOptions))


def _read_ids(texts: Any) -> tuple[tuple[int, ...], ...]:
    """Lists of token ids, each as text with commas."""
    return tuple(tuple(int(item) for item in text.split(",")) for text in texts)


def _read_one(texts: Any) -> tuple[int, ...]:
    """Token ids, as texts with commas."""
    return tuple(int(item) for text in texts for item in text.split(","))


class RunOptions(GeneratingOptions, frozen=True, kw_only=True):
    """What is continued, and how."""

    prompt: Annotated[tuple[str, ...], Meta(description="Text to continue; repeat it for a batch.")] = ()
    prompt_tokens: Annotated[
        tuple[Any, ...],
        Meta(
            description="Token ids to continue, e.g. 5,17,33; repeat it for a batch.",
            extra={"metavar": "IDS", "read": _read_ids, "expected": "integers and commas: 5,17,33"},
        ),
    ] = ()
    max_new_tokens: Annotated[Count, Meta(description="Largest number of tokens per prompt.")] = 128
    ignore_eos: Annotated[bool, Meta(description="Continue after an end-of-text token.")] = False
    chat: Annotated[bool, Meta(description="Talk with the model, by its own chat template.")] = False
    inputs: Inputs | None = None
    save_outputs: (
        Annotated[Path, Meta(description="With --inputs or --embed: write the outputs to this .npz (or .npy).")] | None
    ) = None
    embed: Annotated[bool, Meta(description="Embeddings of each --prompt, or of each line of --text.")] = False
    text: Annotated[Path, Meta(description="With --embed: file with a text a line, UTF-8.")] | None = None
    prompt_name: (
        Annotated[
            str,
            Meta(
                description="With --embed: of the prompts that the model was trained with, the one to put before each text, "
                "e.g. query.",
                extra={"default": "the model's own, if it has one"},
            ),
        ]
        | None
    ) = None
    truncate: Annotated[bool, Meta(description="With --embed: cut texts that are longer than the context.")] = False
    system: Annotated[str, Meta(description="With --chat: what the model is told before the first message.")] = ""
    decoder_input_ids: Annotated[
        tuple[Any, ...],
        Meta(
            description="Of an encoder-decoder model: token ids that the answer begins with, the start token included.",
            extra={"metavar": "IDS", "read": _read_one, "expected": "integers and commas: 5,17,33"},
        ),
    ] = ()
    beams: (
        Annotated[
            Beams,
            Meta(
                description="Of an encoder-decoder model: the best of so many answers that are searched side by side.",
                extra={"default": "1, greedy"},
            ),
        ]
        | None
    ) = None
    length_penalty: (
        Annotated[
            LengthPenalty,
            Meta(
                description="With --beams: answers are compared by their log probability / length to this power.",
                extra={"default": "1"},
            ),
        ]
        | None
    ) = None
    early_stopping: Annotated[bool, Meta(description="With --beams: end as soon as so many answers are finished.")] = (
        False
    )


@click.command()
@artifact_argument
@struct_flags(RunOptions)
@json_option
def run(artifact: Path, as_json: bool, options: RunOptions) -> None:
    """Generate text with ARTIFACT, greedily unless told otherwise; run an encoder or a module on its inputs.

    Sampling applies penalties, temperature, then top-k, then top-p, then min-p; one of these cuts alone
    samples at temperature 1. The same seed and prompt give the same text, alone or in a batch; of equal
    prompts in a batch the first gives that text, and each of the others one of its own.

    \b
    optc run out/fiction-onnx --prompt "The old man looked at the sea, and" --max-new-tokens 64
    optc run out/fiction-onnx --prompt "Once" --prompt "It was" --temperature 0.8 --top-p 0.95 --seed 7
    optc run out/fiction-onnx --prompt-tokens 5,17,33 --json
    optc run out/fiction-paged --prompt "Once" --speculative ngram
    optc run out/assistant --chat --temperature 0.7
    optc run out/encoder --prompt "A text to encode" --prompt "Another"
    optc run out/minilm --embed --prompt "The old man" --prompt "A boat" --json
    optc run out/minilm --embed --text lines.txt --save-outputs lines.npy
    optc run out/resnet --inputs images.npz --save-outputs classes.npz
    optc run out/t5 --prompt "translate English to German: The house is old." --beams 4
    optc run out/whisper --inputs features.npz --decoder-input-ids 50258,50259,50359,50363
    """
    leave_to_own_process([artifact, *([options.draft] if options.draft else [])])
    if options.embed:
        run_embed(artifact, as_json, options)
        return
    refuse_embedding(options)
    if takes_tensors(artifact):
        run_tensors(artifact, as_json, options)
        return
    if options.beams is None and (options.length_penalty is not None or options.early_stopping):
        raise UsageError("--length-penalty and --early-stopping have no effect without --beams", remedy="add --beams 4")
    if options.system and not options.chat:
        raise UsageError("--system has no effect without --chat", remedy="add --chat, or put it into the prompt")
    sounds = read_sounds(artifact, options)
    if sounds is None:
        refuse_inputs(options, artifact)
    if options.chat:
        _chat(artifact, as_json, options)
        return
    from optc.runtime.sessions.load import load

    wanted = _prompts(options) if sounds is None else sounds
    model = load(artifact, threads=options.threads, num_blocks=options.kv_blocks, trust=options.trust)
    engine = _speculating(model, artifact, options)
    single = len(wanted) == 1
    stream = single and not as_json and model.tokenizer is not None
    if stream and options.prompt and stderr().is_terminal:
        say(options.prompt[0], dim=True, nl=False, err=True)
    shared: dict[str, Any] = {"max_new_tokens": options.max_new_tokens, "ignore_eos": options.ignore_eos}
    with _answers(model, options.decoder_input_ids):
        if options.beams is not None:
            stream, found = False, _searched(model, wanted, options, shared)
        else:
            on_text = _print_piece if stream else None
            found = model.generate_batch(wanted, on_text=on_text, **shared, **sampling_of(options))
    rows = [asdict(row) for row in found]
    result = rows[0] if single else _batch(rows)
    if engine is None:
        result |= kv_pool(model.session)
    else:
        figures = engine.metrics().speculation
        assert figures is not None
        result["speculation"] = figures.to_dict()
        engine.close()
    model.close()
    emit(result, as_json, lambda _: _show(rows, streamed=stream))


def _answers(model: Model, ids: tuple[int, ...]) -> AbstractContextManager[None]:
    """Let answers begin with token ids, of a model whose decoder answers.

    Raises:
        UsageError: the model has none.
    """
    from optc.runtime.sessions.encoder_decoder_model import EncoderDecoderModel

    if not ids:
        return nullcontext()
    if not isinstance(model, EncoderDecoderModel):
        raise UsageError(
            "--decoder-input-ids has no effect on a model without an encoder", remedy="put the tokens into the prompt"
        )
    return model.answers_from(ids)


def _searched(model: Model, prompts: list[Any], options: RunOptions, shared: dict[str, Any]) -> list[Any]:
    """The best answers of a beam search.

    Raises:
        UsageError: the model has no encoder, or a flag of sampling was given.
    """
    from optc.runtime.sessions.encoder_decoder_model import EncoderDecoderModel

    if not isinstance(model, EncoderDecoderModel):
        raise UsageError("--beams has no effect on a model without an encoder", remedy="leave it out")
    unused = [field.name for field in msgspec.structs.fields(SamplingOptions) if field.name not in _OF_A_SESSION]
    for name in unused:
        if getattr(options, name) not in (None, 0, 1.0):
            raise UsageError(f"--{name.replace('_', '-')} has no effect with --beams", remedy="leave one of them out")
    penalty = 1.0 if options.length_penalty is None else options.length_penalty
    return model.search(
        prompts, beams=options.beams or 1, length_penalty=penalty, early_stopping=options.early_stopping, **shared
    )


def _speculating(model: Model, artifact: Path, options: RunOptions) -> PagedEngine | None:
    """Let the model generate through an engine that drafts, where the flags ask for it."""
    speculation = options.speculation()
    if speculation is None:
        return None
    from optc.runtime.serving.engine import speculate

    return speculate(model, artifact, speculation, threads=options.threads, trust=options.trust)


def _chat(artifact: Path, as_json: bool, options: RunOptions) -> None:
    from optc.cli.chat import talk

    given = {"prompt": options.prompt, "prompt-tokens": options.prompt_tokens, "json": as_json}
    given |= {"ignore-eos": options.ignore_eos, "speculative": options.speculative}
    for name, value in given.items():
        if value:
            raise UsageError(f"--{name} has no effect with --chat", remedy="leave it out")
    talk(
        artifact,
        system=options.system,
        max_new_tokens=options.max_new_tokens,
        sampling=sampling_of(options),
        threads=options.threads,
        num_blocks=options.kv_blocks,
        trust=options.trust,
    )


def _prompts(options: RunOptions) -> list[Any]:
    if bool(options.prompt) == bool(options.prompt_tokens):
        raise UsageError(
            "give either --prompt or --prompt-tokens" + (", not both" if options.prompt else ""),
            remedy='optc run ARTIFACT --prompt "The old man" or optc run ARTIFACT --prompt-tokens 5,17,33',
        )
    return list(options.prompt or options.prompt_tokens)


def _batch(rows: list[dict[str, Any]]) -> dict[str, Any]:
    shared = ("ttft_ms", "tpot_ms")
    own = [{key: value for key, value in row.items() if key not in shared} for row in rows]
    return {"results": own, **{key: rows[0][key] for key in shared}}


def _print_piece(row: int, piece: str) -> None:
    say(piece, nl=False)


def _show(rows: list[dict[str, Any]], *, streamed: bool) -> None:
    """Text (or token ids) on stdout, timing on a terminal's stderr."""
    if streamed:
        say()
    for index, row in enumerate([] if streamed else rows):
        body = row["text"] if row["text"] is not None else ",".join(map(str, row["tokens"]))
        say(body if len(rows) == 1 else f"[{index}] {body}")
    if stderr().is_terminal:
        count = sum(len(row["tokens"]) for row in rows)
        step = rows[0]["tpot_ms"]
        rate = "" if step is None else f", {step:.2f} ms per token ({len(rows) * 1e3 / step:.0f} tokens/s)"
        stderr().print(f"{count} tokens, first after {rows[0]['ttft_ms']:.1f} ms{rate}", style="dim")
