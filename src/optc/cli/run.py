"""`optc run`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from optc.cli.common import emit, json_option, stderr
from optc.cli.session_options import artifact_argument, kv_pool, session_options
from optc.compiler.diagnostics import UsageError


@click.command()
@artifact_argument
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="Text to continue; repeat it for a batch.")
@click.option(
    "--prompt-tokens",
    "token_lists",
    multiple=True,
    metavar="IDS",
    help="Token ids to continue, e.g. 5,17,33; repeat it for a batch.",
)
@click.option(
    "--max-new-tokens",
    default=128,
    show_default=True,
    help="Maximum number of tokens to generate per prompt.",
)
@click.option("--temperature", type=float, help="Sample at this temperature; 0 is greedy.  [default: 0]")
@click.option("--top-k", type=int, help="Sample among the k most likely tokens.")
@click.option(
    "--top-p",
    type=float,
    help="Sample among the most likely tokens that together reach this probability, e.g. 0.9.",
)
@click.option("--seed", default=0, show_default=True, help="Seed of the sampling; greedy decoding needs none.")
@click.option("--ignore-eos", is_flag=True, help="Continue after an end-of-text token.")
@session_options
@json_option
def run(artifact: Path, prompts: tuple[str, ...], token_lists: tuple[str, ...], as_json: bool, **flags: Any) -> None:
    """Generate text with ARTIFACT, greedily unless told otherwise.

    Sampling applies temperature, then top-k, then top-p; --top-k or --top-p alone sample at
    temperature 1. The same seed and prompt give the same text, alone or in a batch.

    \b
    optc run out/fiction-onnx --prompt "The old man looked at the sea, and" --max-new-tokens 64
    optc run out/fiction-onnx --prompt "Once" --prompt "It was" --temperature 0.8 --top-p 0.95 --seed 7
    optc run out/fiction-onnx --prompt-tokens 5,17,33 --json
    """
    from optc.runtime.sessions.load import load

    wanted = _prompts(prompts, token_lists)
    options = _sampling(flags) | {key: flags[key] for key in ("max_new_tokens", "ignore_eos")}
    model = load(artifact, threads=flags["threads"], num_blocks=flags["kv_blocks"])
    single = len(wanted) == 1
    stream = single and not as_json and model.tokenizer is not None
    if stream and prompts and stderr().is_terminal:
        click.secho(prompts[0], dim=True, nl=False, err=True)
    found = model.generate_batch(wanted, **options, on_text=_print_piece if stream else None)
    rows = [asdict(row) for row in found]
    result = rows[0] if single else _batch(rows)
    result |= kv_pool(model.session)
    model.close()
    emit(result, as_json, lambda _: _show(rows, streamed=stream))


def _prompts(texts: tuple[str, ...], token_lists: tuple[str, ...]) -> list[Any]:
    if bool(texts) == bool(token_lists):
        raise UsageError(
            "give either --prompt or --prompt-tokens" + (", not both" if texts else ""),
            remedy='optc run ARTIFACT --prompt "The old man" or optc run ARTIFACT --prompt-tokens 5,17,33',
        )
    return list(texts) if texts else [_ids(item) for item in token_lists]


def _ids(text: str) -> list[int]:
    try:
        return [int(item) for item in text.split(",")]
    except ValueError as error:
        raise UsageError(
            f"--prompt-tokens '{text}' is not a list of integers", remedy="write ids and commas: 5,17,33"
        ) from error


def _sampling(flags: dict[str, Any]) -> dict[str, Any]:
    """Options of `Model.generate`; asking for top-k or top-p means to sample."""
    chosen = {key: flags[key] for key in ("temperature", "top_k", "top_p") if flags[key] is not None}
    if chosen and "temperature" not in chosen:
        chosen["temperature"] = 1.0
    return {**chosen, "seed": flags["seed"]}


def _batch(rows: list[dict[str, Any]]) -> dict[str, Any]:
    shared = ("ttft_ms", "tpot_ms")
    own = [{key: value for key, value in row.items() if key not in shared} for row in rows]
    return {"results": own, **{key: rows[0][key] for key in shared}}


def _print_piece(row: int, piece: str) -> None:
    click.echo(piece, nl=False)


def _show(rows: list[dict[str, Any]], *, streamed: bool) -> None:
    """Text (or token ids) on stdout, timing on a terminal's stderr."""
    if streamed:
        click.echo()
    for index, row in enumerate([] if streamed else rows):
        body = row["text"] if row["text"] is not None else ",".join(map(str, row["tokens"]))
        click.echo(body if len(rows) == 1 else f"[{index}] {body}")
    if stderr().is_terminal:
        count = sum(len(row["tokens"]) for row in rows)
        step = rows[0]["tpot_ms"]
        rate = "" if step is None else f", {step:.2f} ms per token ({len(rows) * 1e3 / step:.0f} tokens/s)"
        stderr().print(f"{count} tokens, first after {rows[0]['ttft_ms']:.1f} ms{rate}", style="dim")
