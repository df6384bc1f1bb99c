"""`optc bench`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import click
from msgspec import Meta

from optc.cli.bench_serve import LoadOptions, bench_serve
from optc.cli.bench_speculative import bench_speculative
from optc.cli.common import emit, json_option, say
from optc.cli.options import struct_flags
from optc.cli.own_process import leave_to_own_process
from optc.cli.session_options import Save, kv_pool, sampling_of, save_figures
from optc.cli.tensors import Inputs, bench_tensors, reads_sounds, refuse_inputs, show_speed, takes_tensors
from optc.compiler.diagnostics import TargetError, UsageError
from optc.compiler.settings.device import DeviceName
from optc.progress import part, progress
from optc.runtime.bounds import Batch, Count, Samples, TimedTokens, Warmup


class BenchOptions(LoadOptions, frozen=True, kw_only=True):
    """What is timed."""

    prompt_length: Annotated[
        tuple[Count, ...],
        Meta(
            description="Prompt tokens; repeat it for several lengths.",
            extra={"metavar": "N", "default": "512, or what the context holds", "expected": "an integer, 1 or more"},
        ),
    ] = ()
    new_tokens: Annotated[TimedTokens, Meta(description="Tokens to generate per sample.")] = 64
    batch: Annotated[Batch, Meta(description="Prompts per batch.")] = 1
    samples: Annotated[Samples, Meta(description="Timed generations per prompt length.")] = 5
    warmup: (
        Annotated[
            Warmup,
            Meta(
                description="Untimed generations before the timed ones.",
                extra={"default": "1; on CUDA 2, as the second one is captured; with --serve none"},
            ),
        ]
        | None
    ) = None
    save: Save = False
    inputs: Inputs | None = None
    text: (
        Annotated[Path, Meta(description="With --speculative: text file that prompts are cut from, UTF-8.")] | None
    ) = None
    device: (
        Annotated[
            DeviceName,
            Meta(
                description="Where the engine shall run; refused where the artifact is for another.",
                extra={"default": "its own"},
            ),
        ]
        | None
    ) = None


@click.command()
@click.argument("artifact")
@struct_flags(BenchOptions)
@json_option
def bench(artifact: str, as_json: bool, options: BenchOptions) -> None:
    """Time to first token, prefill and decode speed of ARTIFACT, and its memory.

    Medians over samples with a 95 % bootstrap interval. The machine's read bandwidth over the bytes
    of the weights, the limit for decoding one row, is printed beside it. Tokens are chosen greedily,
    or sampled as optc run does it.

    \b
    optc bench out/fiction-onnx
    optc bench out/fiction-onnx --prompt-length 128 --prompt-length 1024 --batch 4 --samples 10 --json
    optc bench out/fiction-paged --speculative ngram --text book.txt
    optc bench out/resnet --batch 8 --samples 50
    optc bench --serve out/fiction-onnx --concurrency 1 --concurrency 16 --requests 64
    optc bench --serve http://127.0.0.1:8000 --rate 4 --slo-ttft-ms 500 --slo-tpot-ms 50
    """
    if options.serve:
        _bench_serve(artifact, as_json, options)
    else:
        options.refuse_without_serve()
        speculation = options.speculation(adaptive=False)
        if speculation is not None:
            bench_speculative(Path(artifact), as_json, options, speculation)
            return
        leave_to_own_process([Path(artifact)])
        with progress("measuring"):
            result = benchmark_of(Path(artifact), options)
        emit(result, as_json, show_speed if takes_tensors(Path(artifact)) else _show)


def benchmark_of(artifact: Path, options: BenchOptions) -> dict[str, Any]:
    """What `optc bench` prints of an artifact that it runs itself.

    Raises:
        OptcError: an artifact that does not run, or options without effect on it.
    """
    if options.text is not None:
        raise UsageError("--text has no effect without --speculative", remedy="leave it out")
    if takes_tensors(artifact):
        return bench_tensors(artifact, options)
    refuse_inputs(options, artifact)
    if reads_sounds(artifact):
        raise TargetError(
            "optc bench feeds token ids, and the model reads sounds", remedy="measure optc run --inputs FILE.npz --json"
        )
    return _bench_session(artifact, options)


_OF_SESSIONS = ("inputs", "batch", "samples", "save", "device", "text")


def _bench_serve(what: str, as_json: bool, options: BenchOptions) -> None:
    plain = BenchOptions()
    idle = [name for name in _OF_SESSIONS if getattr(options, name) != getattr(plain, name)]
    if idle:
        raise UsageError(f"--{idle[0].replace('_', '-')} has no effect with --serve", remedy="leave it out")
    if len(options.prompt_length) > 1:
        raise UsageError("--serve takes one --prompt-length", remedy="give --length-sigma or --trace for several")
    options.speculation()  # refused here, not in the server's process
    prompt_length = next(iter(options.prompt_length), None)
    bench_serve(
        what,
        as_json,
        options,
        prompt_length=prompt_length,
        new_tokens=options.new_tokens,
        warmup=options.warmup or 0,
    )


def _bench_session(artifact: Path, options: BenchOptions) -> dict[str, Any]:
    from optc.runtime.measuring.benchmark import benchmark, environment
    from optc.runtime.sampling import Sampling
    from optc.runtime.sessions.load import load
    from optc.runtime.sessions.session import default_threads

    sampling = Sampling(**sampling_of(options))
    threads = options.threads or default_threads()
    model = load(
        artifact, threads=options.threads, num_blocks=options.kv_blocks, device=options.device, trust=options.trust
    )
    lengths = options.prompt_length or (max(1, min(512, model.session.context_length - options.new_tokens)),)
    with part("samples") as update:
        found = benchmark(
            model.session,
            prompt_lengths=lengths,
            threads=threads,
            new_tokens=options.new_tokens,
            sampling=sampling,
            batch=options.batch,
            samples=options.samples,
            warmup=options.warmup,
            on_sample=lambda done, total: update(done, f"{done} of {total}"),
        )
    pool = kv_pool(model.session)
    model.close()
    weight_bytes = model.manifest.model_bytes
    result = found.to_dict() | {
        "weight_bytes": weight_bytes,
        "weight_read_limit_tokens_per_s": found.batch * found.read_bytes_per_s / weight_bytes if weight_bytes else None,
        "environment": environment(threads),
        **pool,
    }
    if options.save:
        save_figures(artifact, speed=result)
    return result


def _show(result: dict[str, Any]) -> None:
    for row in result["prompts"]:
        sizes = f"prompt of {row['prompt_tokens']} tokens, batch {result['batch']}, {result['samples']} samples"
        say(", ".join([sizes, *_chosen(result["sampling"])]))
        say(f"  decode   {_rate(row['decode_tokens_per_s'])} tokens/s")
        say(f"  prefill  {_rate(row['prefill_tokens_per_s'])} tokens/s")
        first = f", the first one {row['first_ttft_ms']:.1f} ms" if result["gpu"] else ""
        say(f"  TTFT     {_rate(row['ttft_ms'])} ms{first}")
    limit = result["weight_read_limit_tokens_per_s"]
    say(f"weights  {result['weight_bytes'] / 1e6:.2f} MB, peak RSS {result['peak_rss_bytes'] / 1e6:.0f} MB")
    say(
        f"limit    {result['read_bytes_per_s'] / 1e9:.1f} GB/s measured read bandwidth"
        + (f": at most {limit:.0f} tokens/s, each weight read once per step" if limit else "")
    )
    cpu = f"{result['environment']['cpu']}, {result['environment']['threads']} thread(s)"
    say(f"on       {result['gpu'] or cpu}")


def _chosen(sampling: dict[str, Any]) -> list[str]:
    """How tokens were chosen, where it is not the default; every setting that differs."""
    from optc.runtime.sampling import Sampling

    plain = asdict(Sampling())
    given = [f"{name.replace('_', '-')} {value:g}" for name, value in sampling.items() if value != plain[name]]
    return [f"{'drawn at' if sampling['temperature'] else 'greedy with'} {', '.join(given)}"] if given else []


def _rate(row: dict[str, Any]) -> str:
    return f"{row['median']:10.1f}  [{row['ci95'][0]:.1f}, {row['ci95'][1]:.1f}]"
