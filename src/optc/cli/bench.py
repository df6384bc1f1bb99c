"""`optc bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from optc.cli.common import emit, json_option, progress
from optc.cli.session_options import (
    artifact_argument,
    device_option,
    kv_pool,
    save_figures,
    save_option,
    session_options,
)


@click.command()
@artifact_argument
@click.option(
    "--prompt-length",
    "prompt_lengths",
    type=int,
    multiple=True,
    metavar="N",
    help="Prompt tokens; repeat it for several lengths.  [default: 512, or what the context holds]",
)
@click.option("--new-tokens", default=64, show_default=True, help="Tokens to generate per sample.")
@click.option("--batch", default=1, show_default=True, help="Prompts per batch.")
@click.option("--samples", default=5, show_default=True, help="Timed generations per prompt length.")
@click.option("--warmup", default=1, show_default=True, help="Untimed warm-up generations before the timed ones.")
@save_option
@session_options
@device_option("Where the engine shall run; refused where the artifact is for another.  [default: its own]")
@json_option
def bench(artifact: Path, as_json: bool, **flags: Any) -> None:
    """Time to first token, prefill and decode speed of ARTIFACT, and its memory.

    Medians over samples with a 95 % bootstrap interval. The machine's read bandwidth over the bytes
    of the weights, the limit for decoding one row, is printed beside it.

    \b
    optc bench out/fiction-onnx
    optc bench out/fiction-onnx --prompt-length 128 --prompt-length 1024 --batch 4 --samples 10 --json
    """
    from optc.runtime.measuring.benchmark import benchmark, environment
    from optc.runtime.sessions.load import load
    from optc.runtime.sessions.session import default_threads

    threads = flags["threads"] or default_threads()
    model = load(artifact, threads=flags["threads"], num_blocks=flags["kv_blocks"], device=flags["device"])
    lengths = flags["prompt_lengths"] or (max(1, min(512, model.session.context_length - flags["new_tokens"])),)
    with progress("samples") as update:
        found = benchmark(
            model.session,
            prompt_lengths=lengths,
            threads=threads,
            **{key: flags[key] for key in ("new_tokens", "batch", "samples", "warmup")},
            on_sample=lambda done, total: update(done, f"{done} of {total}"),
        )
    pool = kv_pool(model.session)
    model.close()
    weight_bytes = model.manifest.weight_bytes
    result = found.to_dict() | {
        "weight_bytes": weight_bytes,
        "weight_read_limit_tokens_per_s": found.batch * found.read_bytes_per_s / weight_bytes if weight_bytes else None,
        "environment": environment(threads),
        **pool,
    }
    if flags["save"]:
        save_figures(artifact, speed=result)
    emit(result, as_json, _show)


def _show(result: dict[str, Any]) -> None:
    for row in result["prompts"]:
        click.echo(f"prompt of {row['prompt_tokens']} tokens, batch {result['batch']}, {result['samples']} samples")
        click.echo(f"  decode   {_rate(row['decode_tokens_per_s'])} tokens/s")
        click.echo(f"  prefill  {_rate(row['prefill_tokens_per_s'])} tokens/s")
        click.echo(f"  TTFT     {_rate(row['ttft_ms'])} ms")
    limit = result["weight_read_limit_tokens_per_s"]
    click.echo(f"weights  {result['weight_bytes'] / 1e6:.2f} MB, peak RSS {result['peak_rss_bytes'] / 1e6:.0f} MB")
    click.echo(
        f"limit    {result['read_bytes_per_s'] / 1e9:.1f} GB/s measured read bandwidth"
        + (f": at most {limit:.0f} tokens/s, each weight read once per step" if limit else "")
    )
    click.echo(f"on       {result['environment']['cpu']}, {result['environment']['threads']} thread(s)")


def _rate(row: dict[str, Any]) -> str:
    return f"{row['median']:10.1f}  [{row['ci95'][0]:.1f}, {row['ci95'][1]:.1f}]"
