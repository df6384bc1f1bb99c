"""`optc bench --serve`: load on a server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from optc.cli.common import emit, say
from optc.cli.session_options import GeneratingOptions, sampling_of
from optc.compiler.diagnostics import InputError, OptcError, UsageError, os_errors
from optc.compiler.files import read_plain
from optc.progress import part, progress
from optc.runtime.bounds import Count
from optc.runtime.sampling import Sampling

Rate = Annotated[float, Meta(gt=0, le=1e6)]
Milliseconds = Annotated[float, Meta(gt=0)]
_DEFAULT_PROMPT, _DEFAULT_REQUESTS = 128, 100
_UNKNOWN_CONTEXT, _UNKNOWN_VOCABULARY = 4096, 1000


class LoadOptions(GeneratingOptions, frozen=True, kw_only=True):
    """Load on a server."""

    serve: Annotated[
        bool, Meta(description="Measure a server: one that runs, by its URL, or one that is started for ARTIFACT.")
    ] = False
    requests: (
        Annotated[Count, Meta(description="With --serve: requests of each run.", extra={"default": "100"})] | None
    ) = None
    concurrency: Annotated[
        tuple[Annotated[int, Meta(ge=1, le=1 << 16)], ...],
        Meta(
            description="With --serve: requests that are open at any time; repeat it for several runs.",
            extra={"metavar": "N", "default": "8, where no --rate is given", "expected": "an integer, 1 to 65536"},
        ),
    ] = ()
    rate: Annotated[
        tuple[Rate, ...],
        Meta(
            description="With --serve: requests that come in a second, as a Poisson process; repeat it for several.",
            extra={"metavar": "R", "expected": "a number above 0"},
        ),
    ] = ()
    length_sigma: (
        Annotated[
            float,
            Meta(
                ge=0,
                le=3,
                description="With --serve: lengths are lognormal around --prompt-length and --new-tokens, with this "
                "deviation of their logarithm.",
                extra={"default": "0, all are equal"},
            ),
        ]
        | None
    ) = None
    trace: (
        Annotated[
            Path,
            Meta(
                description='With --serve: lengths and times of JSON lines: {"prompt_tokens": 90, "output_tokens": 40, '
                '"at": 0.2}.'
            ),
        ]
        | None
    ) = None
    slo_ttft_ms: (
        Annotated[Milliseconds, Meta(description="With --serve: goodput counts answers that begin within this.")] | None
    ) = None
    slo_tpot_ms: (
        Annotated[Milliseconds, Meta(description="With --serve: and whose tokens come as fast as this.")] | None
    ) = None
    model_name: (
        Annotated[
            str,
            Meta(
                description="With --serve: the model to ask for.", extra={"default": "the first that the server lists"}
            ),
        ]
        | None
    ) = None
    api_key_file: (
        Annotated[Path, Meta(description="With --serve: file whose first line is the key to send.")] | None
    ) = None
    plot: (
        Annotated[
            Path,
            Meta(
                description="With --serve: write a picture of throughput and latency, SVG or PNG by the file's name.",
                extra={"metavar": "FILE"},
            ),
        ]
        | None
    ) = None

    def refuse_without_serve(self) -> None:
        """Raises:
        UsageError: flags of a load, and no --serve.
        """
        for name, field in zip(LoadOptions.__struct_fields__, LoadOptions.__struct_defaults__, strict=False):
            if name in _OWN and getattr(self, name) != field:
                raise UsageError(
                    f"--{name.replace('_', '-')} has no effect without --serve", remedy="add --serve, or leave it out"
                )


_OWN = set(LoadOptions.__struct_fields__) - set(GeneratingOptions.__struct_fields__)


def bench_serve(
    what: str, as_json: bool, options: LoadOptions, *, prompt_length: int | None, new_tokens: int, warmup: int
) -> None:
    """Measure a server and print what its clients see.

    Raises:
        InputError: no server there, or it answers nothing.
        UsageError: flags that contradict each other.
    """
    from optc.runtime.measuring.load.plot import check_plot, load_plot
    from optc.runtime.measuring.load.workload import read_trace

    if options.plot is not None:
        check_plot(options.plot)
    if options.concurrency and options.rate:
        raise UsageError("--concurrency and --rate are two kinds of load", remedy="give one of them")
    if options.trace is not None and options.length_sigma is not None:
        raise UsageError(
            "--length-sigma has no effect with --trace, which has lengths of its own", remedy="leave it out"
        )
    trace = read_trace(options.trace) if options.trace else ()
    given = {
        "trace": trace,
        "prompt": prompt_length or _DEFAULT_PROMPT,
        "new": new_tokens,
        "warmup": warmup,
        "key": _key(options.api_key_file),
    }
    remote = what.startswith(("http://", "https://"))
    if remote and (idle := next(iter(_server_flags(options)), None)):
        raise UsageError(f"{idle} has no effect on a server that runs already", remedy="leave it out")
    with progress("measuring"), contextlib.nullcontext(what) if remote else started(what, options) as url:
        result = asyncio.run(_measured(url, options, given))
    if options.plot is not None:
        title, embeds = f"{result['model']} at {what}", not result["lengths"]["new"]
        with os_errors("writing the plot", str(options.plot)):
            options.plot.write_bytes(load_plot(result["runs"], title, options.plot, embeds=embeds))
    emit(result, as_json, _show)


def _key(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        return read_plain(path, "reading the API key", most=1 << 20).decode().split("\n", 1)[0].strip()
    except UnicodeDecodeError as error:
        raise InputError(
            "the file of the API key cannot be read",
            where=str(path),
            why=str(error),
            remedy="give a text file with the key in its first line",
        ) from error


@contextlib.contextmanager
def started(artifact: str, options: LoadOptions) -> Iterator[str]:
    """The URL of `optc serve ARTIFACT`, which runs as long as this does.

    Raises:
        OptcError: what the server says when it cannot start.
    """
    command = [sys.executable, "-m", "optc", "serve", artifact, "--port", "0", "--json"]
    command += [word for words in _server_flags(options).values() for word in words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    try:
        first = process.stdout.readline()
        if not first.startswith('{"event": "ready"'):
            raise _failed(first + process.stdout.read())
        yield str(json.loads(first)["url"])
    finally:
        process.terminate()
        process.communicate()


def _server_flags(options: LoadOptions) -> dict[str, list[str]]:
    """The flags of `optc serve` that were given, each with its words."""
    names = ("threads", "kv_blocks", "trust", "speculative", "draft", "draft_tokens", "draft_shape")
    given = {f"--{name.replace('_', '-')}": getattr(options, name) for name in names}
    return {flag: [flag] if value is True else [flag, str(value)] for flag, value in given.items() if value}


def _failed(text: str) -> OptcError:
    from optc.runtime.serving.child import Failed

    try:
        found = json.loads(text[text.index("{\n") :])
        names = {"kind": "error", "what": "what", "where": "where", "why": "cause", "remedy": "remedy"}
        return Failed(**{name: found[key] for name, key in names.items()}).error()
    except (ValueError, KeyError, TypeError):
        return InputError(
            "the server did not start",
            why=text.strip()[-300:] or None,
            remedy="run optc serve by itself, and see what it says",
        )


async def _measured(url: str, options: LoadOptions, given: dict[str, Any]) -> dict[str, Any]:
    from optc.runtime.measuring.benchmark import environment
    from optc.runtime.measuring.load.http_client import Client
    from optc.runtime.measuring.load.run import Slo, closed_loop, figures, open_loop
    from optc.runtime.measuring.load.workload import Workload

    client = Client(url, given["key"])
    models = (await client.get("/models")).get("data") or [{}]
    client.close()
    name = options.model_name or str(models[0].get("id", ""))
    model: dict[str, Any] = next((item for item in models if item.get("id") == name), {})
    embeds = model.get("task") == "embed"
    if embeds:
        _refuse_generating(options)
    workload = Workload(
        prompt_tokens=given["prompt"],
        new_tokens=given["new"],
        longest=int(model.get("max_model_len") or _UNKNOWN_CONTEXT),
        vocab_size=int(model.get("vocab_size") or _UNKNOWN_VOCABULARY),
        sigma=options.length_sigma or 0.0,
        trace=given["trace"],
        seed=options.seed,
        body={"model": name} if embeds else _body(options, name),
        embeds=embeds,
    )
    slo = Slo(ttft_ms=options.slo_ttft_ms, tpot_ms=options.slo_tpot_ms)
    count = options.requests or _DEFAULT_REQUESTS
    loads: list[tuple[int | None, float | None]] = [(None, rate) for rate in options.rate]
    loads += [(number, None) for number in options.concurrency or (() if loads else (8,))]
    runs = []
    with part("requests", total=count * len(loads)) as update:
        for index, (concurrency, rate) in enumerate(loads):
            common = {
                "count": count,
                "warmup": given["warmup"],
                "on_request": lambda done, _, base=index * count: update(base + done, ""),
            }
            own = replace(workload, seed=options.seed + index)  # no run finds the prompts of another in the pool
            if concurrency is not None:
                timings = await closed_loop(url, given["key"], own, concurrency=concurrency, **common)
            else:
                assert rate is not None
                timings = await open_loop(url, given["key"], own, rate=rate, **common)
            runs.append({"concurrency": concurrency, "rate": rate, **figures(timings, slo)})
    return {
        "url": url,
        "model": name,
        "server": model,
        "slo": {"ttft_ms": slo.ttft_ms, "tpot_ms": slo.tpot_ms},
        "lengths": {
            "prompt": given["prompt"],
            "new": 0 if embeds else given["new"],
            "sigma": workload.sigma,
            "trace": bool(given["trace"]),
        },
        "warmup": given["warmup"],
        "runs": runs,
        "environment": environment(options.threads or 0),
    }


def _refuse_generating(options: LoadOptions) -> None:
    """Raises:
    UsageError: flags that say how tokens are chosen, or come, and the model gives embeddings.
    """
    names = [
        name for name, value in sampling_of(options).items() if value != getattr(Sampling(), name) and name != "seed"
    ]
    names += ["slo_tpot_ms"] if options.slo_tpot_ms is not None else []
    if names:
        raise UsageError(
            f"--{names[0].replace('_', '-')} has no effect on a model that gives embeddings", remedy="leave it out"
        )


def _body(options: LoadOptions, name: str) -> dict[str, Any]:
    """What every request says beside its prompt: sampling that differs from greedy."""
    plain = msgspec.to_builtins(Sampling())
    chosen = {key: value for key, value in sampling_of(options).items() if value != plain[key] and key != "seed"}
    return {"model": name, "temperature": 0, **chosen}


def _show(result: dict[str, Any]) -> None:
    lengths = result["lengths"]
    answers = f" and answers of {lengths['new']}" if lengths["new"] else ""
    shape = "a trace" if lengths["trace"] else f"prompts of {lengths['prompt']}{answers} tokens"
    shape += f", lognormal with sigma {lengths['sigma']:g}" if lengths["sigma"] else ""
    say(f"{result['model']} at {result['url']}; {shape}")
    slo = {key.removesuffix("_ms").upper(): value for key, value in result["slo"].items() if value is not None}
    for run in result["runs"]:
        load = f"{run['concurrency']} at once" if run["concurrency"] else f"{run['rate']:g} a second"
        failed = f", {run['failed']} failed: {run['first_error']}" if run["failed"] else ""
        say(f"{load}: {run['requests']} requests in {run['seconds']:.1f} s{failed}")
        kind = "output" if lengths["new"] else "prompt"
        say(f"  {run[f'{kind}_tokens_per_s']:.1f} {kind} tokens/s, {run['requests_per_s']:.2f} requests/s", nl=False)
        within = " and ".join(f"{key} within {value:g} ms" for key, value in slo.items())
        say(f"; {run['goodput_requests_per_s']:.2f} with {within}" if slo else "")
        for name, label in (("ttft_ms", "TTFT"), ("tpot_ms", "TPOT"), ("gap_ms", "gap"), ("e2e_ms", "in all")):
            if run[name]:
                say(f"  {label:6} ms  " + "   ".join(_cell(run[name], item) for item in ("p50", "p90", "p99")))


def _cell(row: dict[str, Any], name: str) -> str:
    low, high = row[name]["ci95"]
    return f"{name} {row[name]['value']:.2f} [{low:.2f}, {high:.2f}]"
