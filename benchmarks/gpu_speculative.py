"""Steps with drafts on the GPU: what one costs beside a plain one, and what the whole loop reaches of what that allows.

    python benchmarks/gpu_speculative.py                                  # 8B shape in bf16 and int4, 1 and 16 requests
    python benchmarks/gpu_speculative.py --variants bf16 --batches 1 --contexts 128
    python benchmarks/gpu_speculative.py --small                          # the same loop on the CPU, without graphs

Weights are random, so acceptance is synthetic (as vLLM's `synthetic` rejection sampler has it): a drafted token is kept with
a given probability where those before it were, whatever the model says; the step is computed whole. Plain decoding is the
engine without drafts, which launches steps ahead of the host. `host` drafts as `ngram` does, on the host, which reads each
step before it plans the next; `device` drafts in captured rounds, as `eagle3` and `medusa` do, here any tokens, which take no
time. Ideal is the tokens of a drafted step over the cost of its captured call beside that of the captured plain step, both
replayed back to back; the loop adds planning and reading, and drafting on the host. All engines decode in turns; medians.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from common import record
from gpu_serve import network, open_session
from torch import Tensor

import optc
from optc.compiler.execution.block_manager import StepInputs
from optc.compiler.ir.contract import OutputRole
from optc.runtime.measuring.benchmark import median_rate
from optc.runtime.measuring.speculation import Decoded, decode
from optc.runtime.sampling import Sampling
from optc.runtime.serving.device_runner import DeviceRunner
from optc.runtime.serving.engine_options import EngineOptions
from optc.runtime.serving.paged_engine import PagedEngine
from optc.runtime.serving.plan import Chosen, Plan
from optc.runtime.serving.round import Round
from optc.runtime.serving.round_runner import RoundRunner
from optc.runtime.serving.verifier import Verifier
from optc.runtime.sessions.cuda import CudaSession
from optc.runtime.speculative import device_drafter
from optc.runtime.speculative.drafter import Ask, Verified
from optc.runtime.speculative.settings import Speculation

REPLAYS = 40
WARM_UP = 2
"""Rounds that do not count: sizes are compiled in the first, and captured in the second."""
CHANCES = 8191
DRAFTERS = ("host", "device")


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
        place = np.arange(most)
        where = plan.positions[:, None] + place + 977 * np.arange(len(plan.decodes))[:, None]
        fits = _drawn()[where % CHANCES] & (place < plan.drafted[:, None])
        kept = fits.cumprod(1).astype(bool)
        drafts = self._rows.history[plan.decodes[:, None], plan.positions[:, None] + 1 + place]
        tokens, counts = exact.tokens.copy(), exact.counts.copy()
        tokens[: len(kept), :most] = np.where(kept, drafts, tokens[: len(kept), :most])
        counts[: len(kept)] = kept.sum(1) + 1
        return Chosen(tokens, counts)


class RandomOnDevice:
    """As `RandomDrafter`, in rounds."""

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary

    def follow(self, inputs: StepInputs, outputs: Mapping[OutputRole, Tensor]) -> None:
        """Nothing is kept."""

    def draft(self, verified: device_drafter.Verified, drafts: Tensor, count: int) -> None:
        """See `DeviceDrafter`."""
        places = (
            torch.arange(count, device=drafts.device)
            + verified.inputs.position_ids.index_select(0, verified.picks)[:, None]
        )
        drafts[: len(places), :count] = places.mul(7919).remainder(self._vocabulary)

    def close(self) -> None:
        """Nothing is open."""


class SyntheticRound(Round):
    """As `SyntheticVerifier`, in a round: what is decided is the draft itself, with a probability."""

    def _decided(self, logits: Tensor) -> Tensor:
        exact = super()._decided(logits)
        places = self._inputs.position_ids + 977 * self._owner[: len(exact)]
        fits = _chances(exact.device).index_select(0, places.remainder(CHANCES)) & (
            self._every % (self.depth + 1) < self.depth
        )
        return torch.where(fits, self._inputs.input_ids.roll(-1), exact)


@functools.cache
def _drawn() -> np.ndarray:
    """Whether a draft is kept, bool [CHANCES], by where it stands."""
    return np.random.default_rng(0).random(CHANCES) < SyntheticVerifier.rate


@functools.cache
def _chances(device: torch.device) -> Tensor:
    return torch.from_numpy(_drawn()).to(device)


class SyntheticRunner(RoundRunner):
    """Its rounds keep drafts with a probability."""

    round_type = SyntheticRound


def engine_of(session: CudaSession, batch: int, draft_tokens: int, drafts: str | None) -> PagedEngine:
    """With drafts that the host makes, or the device; None: without."""
    if drafts is None:
        return PagedEngine(session.model, EngineOptions(max_running=batch), DeviceRunner)
    speculation = Speculation(method="ngram", draft_tokens=draft_tokens, adaptive=False)
    options = EngineOptions(max_running=batch, speculation=speculation)
    if drafts == "device":
        own = RandomOnDevice(session.vocab_size)
        open_runner = functools.partial(SyntheticRunner, drafter=own, most=draft_tokens)
        return PagedEngine(session.model, options, open_runner, drafter=own)
    engine = PagedEngine(
        session.model,
        options,
        functools.partial(DeviceRunner, drafts=True),
        drafter=RandomDrafter(session.vocab_size),
    )
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


def measure(session: CudaSession, batch: int, context: int, given: argparse.Namespace) -> list[dict[str, Any]]:
    """Rounds of all engines, and the captured calls alone: a row for each way to draft."""
    engines = {name: engine_of(session, batch, given.draft_tokens, name) for name in (None, *given.drafts)}
    rng = np.random.default_rng(1)
    found: dict[str | None, list[Decoded]] = {name: [] for name in engines}
    for _ in range(given.rounds + WARM_UP):
        prompts = rng.integers(0, session.vocab_size, (batch, context)).tolist()
        for name, engine in engines.items():
            found[name].append(decode(engine, prompts, given.new_tokens, Sampling()))
    plain = found[None][WARM_UP:]
    asked = {"batch": batch, "context": context, "draft_tokens": given.draft_tokens}
    step = replay_ms(largest_call(engines[None]))
    return [
        {"drafts": name, **asked, **compared(engine, plain, found[name][WARM_UP:], batch, step)}
        for name, engine in engines.items()
        if name is not None
    ]


def compared(
    engine: PagedEngine, plain: list[Decoded], drafted: list[Decoded], batch: int, step: float
) -> dict[str, Any]:
    """What drafts gave, where a plain step takes so many milliseconds."""
    speedups = [(a.seconds / a.count) / (b.seconds / b.count) for a, b in zip(plain, drafted, strict=True)]
    kept = statistics.median(item.count / batch / item.steps for item in drafted)
    call = replay_ms(largest_call(engine))
    took = {
        name: statistics.median(item.seconds / item.count * batch for item in items) * 1e3
        for name, items in (("plain", plain), ("drafted", drafted))
    }
    ideal = kept / (call / step)
    metrics = engine.metrics()
    assert metrics.speculation is not None
    return {
        "acceptance_length": metrics.speculation.acceptance_length,
        "tokens_per_step": kept,
        "plain_step_ms": step,
        "drafted_call_ms": call,
        "cost_of_call": call / step,
        "ms_per_token": took,
        "speedup": median_rate(speedups).to_dict(),
        "ideal": ideal,
        "share_of_ideal": statistics.median(speedups) / ideal,
        "loop_ms_per_drafted_step": took["drafted"] * kept,
        "host_us_per_step": metrics.host_us_per_step,
    }


def largest_call(engine: PagedEngine) -> Callable[[], Any]:
    """The captured plain step, call with drafts, or round of an engine that is largest."""
    runner = engine._runner
    assert isinstance(runner, DeviceRunner)
    if isinstance(runner, RoundRunner):
        return largest_round(runner).run
    calls = [call._call for (_, _, every), call in runner._calls.items() if every]
    if not calls:
        return max(runner._steps.values(), key=lambda item: (item.batch, item.width)).run
    call = max(calls, key=lambda item: item.tokens)
    return call._replay or call._compute


def largest_round(runner: RoundRunner) -> Round:
    """The round of most rows, all of them in the middle of a text of up to 1000 tokens, with whole drafts."""
    this = max(runner._rounds.values(), key=lambda item: item.batch)
    heads = torch.tensor([[5], [200], [1000], [this.depth]], device=runner._model.device)
    this.load(heads.expand(4, this.batch))
    return this


def main() -> None:
    """Run what was asked for, print and record it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="*", default=["bf16", "int4"])
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 16])
    parser.add_argument("--contexts", nargs="*", type=int, default=[128])
    parser.add_argument("--draft-tokens", type=int, default=4)
    parser.add_argument("--drafts", nargs="*", choices=DRAFTERS, default=DRAFTERS)
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
                for row in measure(session, batch, context, given):
                    results.append({"variant": variant, **row})
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
