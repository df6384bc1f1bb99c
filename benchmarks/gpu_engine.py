"""What the serving engine's host costs a small model on the GPU: steps of decodes launched one by one, and several at a time.

    python benchmarks/gpu_engine.py --model ../shared/models/fiction-26m
    python benchmarks/gpu_engine.py --small                                    # fiction-3m on the CPU, without graphs

The model is compiled in bf16, as a user would. All contenders decode the same prompts greedily and in turn, in another
order each time: the engine with so many steps a launch (`--steps`), the engine as served (`paced`), which counts them by what
a step takes, and the session alone (`stream`), which is what `optc run` uses. Medians over batches of prompts with 95 %
intervals, from when all prompts have their first token. `step_us` is the captured step alone, back to back.
`host_us_per_step` is what the engine's host spends on a step beside waiting for the GPU, its launches included.
`equal` is the share of answers that are, token for token, those of one step a launch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from common import ROOT, record
from gpu_eagle3 import interval, streamed
from gpu_speculative import replay_ms

import optc
from optc.compiler.artifact.folder import verify
from optc.compiler.ir.program import Program
from optc.runtime.generation.tokenizer import load_tokenizer
from optc.runtime.measuring.speculation import Decoded, cut_prompts, decode
from optc.runtime.sampling import Sampling
from optc.runtime.serving.device_runner import DeviceRunner
from optc.runtime.serving.engine_options import EngineOptions
from optc.runtime.serving.paged_engine import PagedEngine
from optc.runtime.sessions.cuda import CudaSession
from optc.runtime.sessions.cuda_memory import MemoryPlan
from optc.runtime.sessions.opening import open_session


def opened(folder: Path, small: bool) -> CudaSession:
    """The session over an artifact; on the CPU by the references of the operators."""
    if small:
        return CudaSession(Program.load(folder), MemoryPlan(0, 0, 0, num_blocks=256, prompt_tokens=256))
    session = open_session(folder, verify(folder))
    assert isinstance(session, CudaSession)
    return session


def engine_of(session: CudaSession, batch: int, steps: int) -> PagedEngine:
    """Of so many steps a launch; 0: as served."""
    engine = PagedEngine(session.model, EngineOptions(max_running=batch), DeviceRunner)
    if steps:
        runner_of(engine).pace.fix(steps)
    return engine


def runner_of(engine: PagedEngine) -> DeviceRunner:
    assert isinstance(engine._runner, DeviceRunner)
    return engine._runner


def measure(session: CudaSession, batch: int, text: list[int], given: argparse.Namespace) -> dict[str, Any]:
    """Every contender on every batch of prompts."""
    engines = {f"{steps} a launch": engine_of(session, batch, steps) for steps in (1, *given.steps)}
    engines["paced"] = engine_of(session, batch, 0)
    turns = given.samples + given.warmup
    prompts = cut_prompts(text, batch * turns, given.prompt_tokens)
    found: dict[str, list[Decoded]] = {name: [] for name in engines}
    streams: list[float] = []
    for turn in range(turns):
        own, names = prompts[turn::turns], list(engines)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            found[name].append(decode(engines[name], own, given.new_tokens, Sampling()))
        streams.append(streamed(session, own, given.new_tokens))
    first = found["1 a launch"]
    widest = max(runner_of(engines["1 a launch"])._steps.values(), key=lambda item: item.batch)
    return {
        "batch": batch,
        "step_us": replay_ms(widest.run) * 1e3,
        "stream_tokens_per_s": interval([batch / seconds for seconds in streams[given.warmup :]]).to_dict(),
        **{name: spent(engine, found[name], first, given.warmup) for name, engine in engines.items()},
    }


def spent(engine: PagedEngine, decoded: list[Decoded], first: list[Decoded], warmup: int) -> dict[str, Any]:
    """Of one engine."""
    pairs = list(zip(decoded, first, strict=True))[warmup:]
    same = [own == other for a, b in pairs for own, other in zip(a.tokens, b.tokens, strict=True)]
    return {
        "tokens_per_s": interval([item.count / item.seconds for item, _ in pairs]).to_dict(),
        "speedup": interval([b.seconds / a.seconds for a, b in pairs]).to_dict(),
        "host_us_per_step": engine.metrics().host_us_per_step,
        "steps_a_launch": engine._runner.most_steps,
        "equal": statistics.fmean(same),
    }


def main() -> None:
    """Run what was asked for, print and record it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "examples" / "fiction-3m")
    parser.add_argument("--text", type=Path, default=ROOT / "examples" / "book.txt")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--steps", nargs="*", type=int, default=[4, 8])
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 16])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--samples", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--name", default="gpu_engine")
    given = parser.parse_args()
    if given.small:
        given.batches, given.samples, given.new_tokens, given.dtype, given.steps = [1, 2], 2, 24, "fp32", [3]
    with tempfile.TemporaryDirectory() as folder:
        artifact = Path(folder) / "artifact"
        device = "cpu" if given.small else "auto"
        optc.compile(given.model, output=artifact, target="inductor-cuda", dtype=given.dtype, device=device)
        session = opened(artifact, given.small)
        tokenizer = load_tokenizer(artifact)
        assert tokenizer is not None
        text = tokenizer.encode(given.text.read_text())
        results = []
        for batch in given.batches:
            results.append(measure(session, batch, text, given))
            print(json.dumps(results[-1]), flush=True)
        session.close()
    if given.small:
        return
    from gpu_timing import card

    settings = {name: value.name if isinstance(value, Path) else value for name, value in vars(given).items()}
    record(given.name, {"card": card(), "settings": settings, "results": results}, 2)


if __name__ == "__main__":
    main()
