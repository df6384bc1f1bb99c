"""EAGLE-3 on the GPU beside plain decoding of the same prompts: acceptance, speed-up, and where the time of a round goes.

    python benchmarks/gpu_eagle3.py --model ../shared/models/fiction-26m --draft examples/fiction-26m-eagle3 --text book.txt
    python benchmarks/gpu_eagle3.py ... --depths 4 --batches 1 --profile      # kernels of a round, and of a plain step
    python benchmarks/gpu_eagle3.py --small                                   # fiction-3m on the CPU, without graphs

Both artifacts are compiled as a user would, and decode greedily through engines: plain decoding launches steps ahead of the
host; drafts are made and verified in captured rounds, some of them a step (`--rounds` takes another number). All engines
decode each batch of prompts in turn, in another order each time; medians over batches with 95 % intervals. `stream` is plain
decoding by the session, which `optc run` uses, without an engine. `round_ms` and `step_ms` are captured launches alone, back
to back; `loop_ms` is what a round takes in the loop. `switched` is the engine as served, which chooses depths itself.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ROOT, record
from gpu_speculative import largest_round, replay_ms

import optc
from optc.compiler.artifact.folder import verify
from optc.compiler.ir.program import Program
from optc.runtime.generation.tokenizer import load_tokenizer
from optc.runtime.measuring.benchmark import Rate, median_rate
from optc.runtime.measuring.speculation import Decoded, cut_prompts, decode
from optc.runtime.sampling import Sampling
from optc.runtime.serving.device_runner import DeviceRunner
from optc.runtime.serving.engine import engine_for
from optc.runtime.serving.engine_options import EngineOptions
from optc.runtime.serving.paged_engine import PagedEngine
from optc.runtime.serving.round_drafting import RoundDrafting
from optc.runtime.serving.round_runner import RoundRunner
from optc.runtime.sessions.cuda import CudaSession
from optc.runtime.sessions.cuda_memory import MemoryPlan
from optc.runtime.sessions.opening import open_session
from optc.runtime.speculative.device_drafter import Eagle3OnDevice
from optc.runtime.speculative.opening import Verifying, eagle3_on_device, open_drafter
from optc.runtime.speculative.settings import Speculation

Launch = Callable[[], Any]


def compiled(given: argparse.Namespace, folder: Path) -> tuple[Path, Path]:
    """Artifacts of both models."""
    layers = tuple(json.loads((given.draft / "config.json").read_text())["eagle_aux_hidden_state_layer_ids"])
    common = {
        "target": "inductor-cuda",
        "dtype": given.dtype,
        "device": "cpu" if given.small else "auto",
        "force": True,
    }
    quant = {} if given.quant == "none" else {"quant": given.quant}
    base, draft = folder / "base", folder / "draft"
    optc.compile(given.model, output=base, expose_hidden=layers, **common, **quant)
    optc.compile(given.draft, output=draft, base=given.model, **common)
    return base, draft


def opened(base: Path, draft: Path, given: argparse.Namespace) -> tuple[CudaSession, Eagle3OnDevice]:
    """Sessions over both; on the CPU by the references of the operators."""
    if given.small:
        plan = MemoryPlan(0, 0, 0, num_blocks=256, prompt_tokens=256)
        sessions = [CudaSession(Program.load(folder), plan) for folder in (base, draft)]
        return sessions[0], eagle3_on_device(sessions[1])
    session = open_session(base, verify(base))
    assert isinstance(session, CudaSession)
    speculation = Speculation(method="eagle3", draft=draft, draft_tokens=max(given.depths))
    drafter = open_drafter(speculation, Verifying(model=session.model, folder=base, running=max(given.batches)))
    assert isinstance(drafter, Eagle3OnDevice)
    return session, drafter


def engine_of(
    session: CudaSession, drafter: Eagle3OnDevice, batch: int, depth: int | None, *, switched: bool = False
) -> PagedEngine:
    """With drafts of a depth, or without."""
    speculation = (
        None
        if depth is None
        else Speculation(method="eagle3", draft=Path("draft"), draft_tokens=depth, adaptive=switched)
    )
    options = EngineOptions(max_running=batch, speculation=speculation)
    engine = engine_for(session, options, drafter=None if depth is None else drafter)
    assert isinstance(engine, PagedEngine)
    return engine


def streamed(session: CudaSession, prompts: Sequence[Sequence[int]], count: int) -> float:
    """Seconds per step of the session's own plain decoding, from the first token on."""
    logits = session.prefill(prompts)
    first = [int(row.argmax()) for row in logits]
    begin = time.perf_counter()
    for _ in session.stream(first, count):
        pass
    return (time.perf_counter() - begin) / count


def interval(values: Sequence[float]) -> Rate:
    return median_rate(list(values))


def measure(session: CudaSession, drafter: Eagle3OnDevice, batch: int, text: list[int], given: Any) -> dict[str, Any]:
    """Every engine on every batch of prompts."""
    engines = {"plain": engine_of(session, drafter, batch, None)}
    for depth in given.depths:
        engines[f"depth {depth}"] = engine_of(session, drafter, batch, depth)
    engines["switched"] = engine_of(session, drafter, batch, max(given.depths), switched=True)
    for engine in engines.values():
        if given.rounds and isinstance(engine._drafting, RoundDrafting):
            engine._drafting.fix_rounds(given.rounds)
    turns = given.samples + given.warmup
    prompts = cut_prompts(text, batch * turns, given.prompt_tokens)
    found: dict[str, list[Decoded]] = {name: [] for name in engines}
    streams: list[float] = []
    for turn in range(turns):
        own = prompts[turn::turns]
        names = list(engines)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            found[name].append(decode(engines[name], own, given.new_tokens, Sampling()))
        streams.append(streamed(session, own, given.new_tokens))
    plain = found["plain"][given.warmup :]
    result: dict[str, Any] = {
        "batch": batch,
        "plain_tokens_per_s": interval([item.count / item.seconds for item in plain]).to_dict(),
        "stream_tokens_per_s": interval([batch / seconds for seconds in streams[given.warmup :]]).to_dict(),
        "plain_host_us": engines["plain"].metrics().host_us_per_step,
    }
    for name, engine in engines.items():
        if name != "plain":
            drafted = found[name][given.warmup :]
            result[name] = compared(engine, plain, drafted, streams[given.warmup :], batch)
            asked = [prompts[turn::turns] for turn in range(given.warmup, turns)]
            result[name]["margins"] = margins(session, asked, plain, drafted, given.dtype)
    if not given.small:
        result |= alone(engines, batch, given.profile)
    return result


def compared(
    engine: PagedEngine, plain: list[Decoded], drafted: list[Decoded], streams: list[float], batch: int
) -> dict[str, Any]:
    """What drafts gave."""
    pairs = list(zip(plain, drafted, strict=True))
    figures = engine.metrics().speculation
    assert figures is not None
    same = [own == other for a, b in pairs for own, other in zip(a.tokens, b.tokens, strict=True)]
    return {
        "speedup": interval([a.seconds / b.seconds for a, b in pairs]).to_dict(),
        "speedup_over_stream": interval(
            [(step * b.count / batch) / b.seconds for step, b in zip(streams, drafted, strict=True)]
        ).to_dict(),
        "tokens_per_s": interval([b.count / b.seconds for _, b in pairs]).to_dict(),
        "tokens_per_round": interval([b.count / batch / b.steps for _, b in pairs]).to_dict(),
        "loop_ms": interval([b.seconds / b.steps * 1e3 for _, b in pairs]).to_dict(),
        "acceptance_length": figures.acceptance_length,
        "acceptance_by_position": figures.acceptance_by_position,
        "equal": float(np.mean(same)),
        "host_us_per_step": engine.metrics().host_us_per_step,
    }


def margins(
    session: CudaSession,
    asked: Sequence[Sequence[Sequence[int]]],
    plain: Sequence[Decoded],
    drafted: Sequence[Decoded],
    dtype: str,
) -> dict[str, int]:
    """How often answers part, by the distance of the two tokens' logits in spacings of the type."""
    bits = {"bf16": 8, "fp16": 11, "fp32": 24}[dtype]
    found = Counter[str]()
    for prompts, one, other in zip(asked, plain, drafted, strict=True):
        for prompt, a, b in zip(prompts, one.tokens, other.tokens, strict=True):
            place = next((place for place, pair in enumerate(zip(a, b, strict=True)) if pair[0] != pair[1]), None)
            if place is None:
                continue
            *_, logits = session.score([*prompt, *a[:place]])  # which finds nothing in the pool
            logits = logits[-1]
            first, second = float(logits[a[place]]), float(logits[b[place]])
            spacing = 2.0 ** (math.floor(math.log2(max(abs(first), abs(second), 1e-30))) + 1 - bits)
            found[str(round(abs(first - second) / spacing))] += 1
    return dict(sorted(found.items(), key=lambda item: int(item[0])))


def alone(engines: dict[str, PagedEngine], batch: int, profile: bool) -> dict[str, Any]:
    """Captured launches of the largest number of rows: of plain steps, and of rounds by depth."""
    launches: dict[str, Launch] = {}
    plain = engines["plain"]._runner
    assert isinstance(plain, DeviceRunner)
    launches["step"] = max(plain._steps.values(), key=lambda item: item.batch).run
    for name, engine in engines.items():
        runner = engine._runner
        if isinstance(runner, RoundRunner) and name != "switched":
            launches[name] = largest_round(runner).run
    result: dict[str, Any] = {"alone_ms": {name: replay_ms(launch) for name, launch in launches.items()}}
    if profile:
        result["kernels"] = {name: kernels_of(launch) for name, launch in launches.items()}
    return result


def kernels_of(launch: Launch, runs: int = 10) -> list[dict[str, Any]]:
    """Kernels of a launch by name: how many, and their microseconds; the time of a kernel that waits for the one before
    holds that wait."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(runs):
            launch()
        torch.cuda.synchronize()
    count, spent = Counter[str](), Counter[str]()
    for event in trace.events() or ():
        if event.device_type.name == "CUDA":
            count[event.name] += 1
            spent[event.name] += event.device_time
    return [
        {"kernel": name, "count": count[name] / runs, "us": round(total / runs, 2)}
        for name, total in spent.most_common(24)
    ]


def main() -> None:
    """Run what was asked for, print and record it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "examples" / "fiction-3m")
    parser.add_argument("--draft", type=Path, default=ROOT / "examples" / "fiction-3m-eagle3")
    parser.add_argument("--text", type=Path, default=ROOT / "examples" / "book.txt")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--quant", default="none", help="of the model that verifies")
    parser.add_argument("--depths", nargs="*", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 4, 16])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=192)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=0, help="of a step; 0: as served")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--name", default="gpu_eagle3")
    given = parser.parse_args()
    if given.small:
        given.depths, given.batches, given.samples, given.new_tokens, given.dtype = [2], [1, 2], 2, 24, "fp32"
    with tempfile.TemporaryDirectory() as folder:
        base, draft = compiled(given, Path(folder))
        session, drafter = opened(base, draft, given)
        tokenizer = load_tokenizer(base)
        assert tokenizer is not None
        text = tokenizer.encode(given.text.read_text())
        results = []
        for batch in given.batches:
            results.append(measure(session, drafter, batch, text, given))
            print(json.dumps(results[-1]), flush=True)
        drafter.close()
        session.close()
    if given.small:
        return
    from gpu_timing import card

    settings = {
        name: value.name if isinstance(value, Path) else value for name, value in vars(given).items() if name != "small"
    }
    record(given.name, {"card": card(), "settings": settings, "results": results}, 2)


if __name__ == "__main__":
    main()
