"""Steps with drafts on the GPU: what one costs beside a plain one, and what the whole loop reaches of what that allows.

    python benchmarks/gpu_speculative.py                                  # 8B shape in bf16 and int4, 1 and 16 requests
    python benchmarks/gpu_speculative.py --variants bf16 --batches 1 --contexts 128
    python benchmarks/gpu_speculative.py --small                          # the same loop on the CPU, without graphs

Weights are random, so acceptance is synthetic (as vLLM's `synthetic` rejection sampler has it): a drafted token is kept with
a given probability where those before it were, whatever the model says; the step is computed whole. Plain decoding is the
engine without drafts, which launches steps ahead of the host. Ideal is the tokens of a drafted step over the cost of its
captured call beside that of the captured plain step, both replayed back to back; the loop adds drafting, planning and reading.
Rounds of both alternate; medians.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import statistics
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from common import record
from gpu_serve import network, open_session
from torch import Tensor

import optc
from optc.runtime.measuring.benchmark import median_rate
from optc.runtime.measuring.speculation import decode
from optc.runtime.sampling import Sampling
from optc.runtime.serving.device_runner import DeviceRunner
from optc.runtime.serving.engine_options import EngineOptions
from optc.runtime.serving.paged_engine import PagedEngine
from optc.runtime.serving.plan import Chosen, Plan
from optc.runtime.serving.verifier import Verifier
from optc.runtime.sessions.cuda import CudaSession
from optc.runtime.speculative.drafter import Ask, Verified
from optc.runtime.speculative.settings import Speculation

REPLAYS = 40


class RandomDrafter:
    """Drafts as many tokens as may be, any ones."""

    def __init__(self, vocabulary: int) -> None:
        self._rng, self._vocabulary = np.random.default_rng(0), vocabulary

    def propose(self, asks: Sequence[Ask]) -> list[list[int]]:
        drafts = self._rng.integers(0, self._vocabulary, (len(asks), max(ask.most for ask in asks))).tolist()
        return [draft[: ask.most] for draft, ask in zip(drafts, asks, strict=True)]

    def observe(self, verified: Sequence[Verified]) -> None:
        """Nothing to learn."""

    def forget(self, identity: str) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Nothing is open."""


class SyntheticVerifier(Verifier):
    """Keeps each drafted token with a probability, as long as those before it were kept."""

    rate = 0.8

    def keep(self, decided: Tensor, plan: Plan) -> Chosen:
        """See `Verifier`."""
        exact, most = super().keep(decided, plan), int(plan.drafted.max())
        rng = np.random.default_rng(int(plan.positions.sum()) + len(plan.decodes))
        place = np.arange(most)
        fits = (rng.random((len(plan.decodes), most)) < self.rate) & (place < plan.drafted[:, None])
        kept = fits.cumprod(1).astype(bool)
        drafts = self._rows.history[plan.decodes[:, None], plan.positions[:, None] + 1 + place]
        tokens, counts = exact.tokens.copy(), exact.counts.copy()
        tokens[: len(kept), :most] = np.where(kept, drafts, tokens[: len(kept), :most])
        counts[: len(kept)] = kept.sum(1) + 1
        return Chosen(tokens, counts)


def engine_of(session: CudaSession, batch: int, draft_tokens: int | None) -> PagedEngine:
    """With drafts, or without."""
    speculation = (
        None if draft_tokens is None else Speculation(method="ngram", draft_tokens=draft_tokens, adaptive=False)
    )
    engine = PagedEngine(
        session.model,
        EngineOptions(max_running=batch, speculation=speculation),
        functools.partial(DeviceRunner, drafts=draft_tokens is not None),
        drafter=None if draft_tokens is None else RandomDrafter(session.vocab_size),
    )
    if draft_tokens is not None:
        runner = engine._runner
        assert isinstance(runner, DeviceRunner)
        runner._verifier = SyntheticVerifier(runner._rows, runner._sampler_of)
    return engine


def replay_ms(launch: Any) -> float:
    """Milliseconds of one launch, many back to back."""
    if not torch.cuda.is_available():
        begin = time.perf_counter()
        launch()
        return (time.perf_counter() - begin) * 1e3
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    launch()
    start.record()
    for _ in range(REPLAYS):
        launch()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / REPLAYS


def measure(session: CudaSession, batch: int, context: int, given: argparse.Namespace) -> dict[str, Any]:
    """Rounds of both, and the captured calls alone."""
    engines = {
        name: engine_of(session, batch, given.draft_tokens if name == "drafted" else None)
        for name in ("plain", "drafted")
    }
    rng = np.random.default_rng(1)
    seconds: dict[str, list[float]] = {"plain": [], "drafted": []}
    tokens_per_step = []
    for turn in range(given.rounds + 2):
        prompts = rng.integers(0, session.vocab_size, (batch, context)).tolist()
        for name, engine in engines.items():
            found = decode(engine, prompts, given.new_tokens, Sampling())
            if turn >= 2:  # sizes are compiled in the first, and captured in the second
                seconds[name].append(found.seconds / found.count * batch)
            if turn >= 2 and name == "drafted":
                figures = engine.metrics().speculation
                assert figures is not None
                tokens_per_step.append(found.count / batch / found.steps)
    step, call = _alone(engines)
    speedups = [a / b for a, b in zip(seconds["plain"], seconds["drafted"], strict=True)]
    kept = statistics.median(tokens_per_step)
    found_ms = {name: statistics.median(times) * 1e3 for name, times in seconds.items()}
    ideal = kept / (call / step)
    figures = engines["drafted"].metrics().speculation
    assert figures is not None
    return {
        "batch": batch,
        "context": context,
        "draft_tokens": given.draft_tokens,
        "acceptance_length": figures.acceptance_length,
        "tokens_per_step": kept,
        "plain_step_ms": step,
        "drafted_call_ms": call,
        "cost_of_call": call / step,
        "ms_per_token": found_ms,
        "speedup": median_rate(speedups).to_dict(),
        "ideal": ideal,
        "share_of_ideal": statistics.median(speedups) / ideal,
        "loop_ms_per_drafted_step": found_ms["drafted"] * kept,
    }


def _alone(engines: dict[str, PagedEngine]) -> tuple[float, float]:
    """Milliseconds of the captured plain step and of the captured call with drafts that ran last and are largest."""
    plain, drafted = (engines[name]._runner for name in ("plain", "drafted"))
    assert isinstance(plain, DeviceRunner)
    assert isinstance(drafted, DeviceRunner)
    steps = [step for (_, _, _), step in plain._steps.items()]
    calls = [call for (_, _, every), call in drafted._calls.items() if every]
    step = max(steps, key=lambda item: (item.batch, item.width))
    call = max(calls, key=lambda item: item._call.tokens)._call
    return replay_ms(step.run), replay_ms(call._replay or call._compute)


def main() -> None:
    """Run what was asked for, print and record it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="*", default=["bf16", "int4"])
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 16])
    parser.add_argument("--contexts", nargs="*", type=int, default=[128])
    parser.add_argument("--draft-tokens", type=int, default=4)
    parser.add_argument("--acceptance", type=float, default=0.8, help="probability that a drafted token is kept")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--name", default="gpu_speculative")
    given = parser.parse_args()
    SyntheticVerifier.rate = given.acceptance
    if given.small:
        given.variants, given.batches, given.contexts, given.new_tokens, given.rounds = ["bf16"], [1, 3], [16], 24, 2
    program = optc.capture(network("small" if given.small else "8b", "cpu" if given.small else "cuda"))
    results = []
    for variant in given.variants:
        session = open_session(program, variant, 2048, given.small)
        for batch in given.batches:
            for context in given.contexts:
                results.append({"variant": variant, **measure(session, batch, context, given)})
                print(json.dumps(results[-1]), flush=True)
        session.close()
        gc.collect()
        if not given.small:
            torch.cuda.empty_cache()
    if given.small:
        return
    from gpu_timing import card

    record(given.name, {"card": card(), "settings": vars(given), "results": results}, 2)


if __name__ == "__main__":
    main()
