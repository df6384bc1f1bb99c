"""Speculative decoding beside plain decoding of the same prompts: acceptance, cost of a step, speed-up.

Both run in turns, each time through an engine of its own over the same session, so that neither finds what the other left.
On a GPU an engine captures its steps when it first runs them, so there is one of each kind for all samples; they share the
session's pool, and no prompt begins as another does. Decoding alone is timed: from when all prompts have their
first token.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np

from optc.compiler.diagnostics import InputError
from optc.compiler.execution.block_manager import least_shared
from optc.runtime.measuring.benchmark import Rate, median_rate
from optc.runtime.sampling import Sampling
from optc.runtime.serving.engine import engine_for
from optc.runtime.serving.engine_options import EngineOptions
from optc.runtime.serving.interface import Engine
from optc.runtime.serving.request import Generate
from optc.runtime.sessions.paged import PagedSession
from optc.runtime.speculative.device_drafter import DeviceDrafter
from optc.runtime.speculative.drafter import Drafter
from optc.runtime.speculative.figures import SpeculativeFigures
from optc.runtime.speculative.settings import Speculation


@dataclass(frozen=True)
class Decoded:
    """What decoding took.

    Attributes:
        tokens: of each prompt, its whole answer.
        seconds, steps, count: from when all prompts had their first token; `count` tokens came then.
    """

    tokens: list[list[int]]
    seconds: float
    steps: int
    count: int


@dataclass(frozen=True)
class SpeculationSpeed:
    """Medians over samples with 95 % intervals, of which each is a batch of prompts.

    Attributes:
        speedup: seconds of plain decoding over those with drafts, of the same prompts.
        step_cost: seconds of a step with drafts, what the drafter takes included, over those of a plain one.
        equal: share of the answers that were, token for token, those of plain decoding.
    """

    speedup: Rate
    step_cost: Rate
    plain_tokens_per_s: Rate
    tokens_per_s: Rate
    equal: float
    figures: SpeculativeFigures

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        rates = {
            name: getattr(self, name).to_dict()
            for name in ("speedup", "step_cost", "plain_tokens_per_s", "tokens_per_s")
        }
        counters = self.figures.to_dict()
        shown = (
            "method",
            "acceptance_length",
            "acceptance_by_position",
            "tree",
            "verified",
            "drafted_tokens",
            "accepted_tokens",
        )
        return {**rates, "equal": self.equal, **{name: counters[name] for name in shown}}


def decode(engine: Engine, prompts: Sequence[Sequence[int]], new_tokens: int, sampling: Sampling) -> Decoded:
    """Let an engine without requests continue prompts; there are no stop tokens."""
    answers: list[list[int]] = [[] for _ in prompts]
    for row, prompt in enumerate(prompts):
        engine.submit(Generate(id=str(row), prompt=list(prompt), max_new_tokens=new_tokens, sampling=sampling))
    begin = first_steps = first_count = 0.0
    while not engine.idle:
        for answer in engine.step():
            answers[int(answer.id)] += answer.tokens
        if not begin and all(answers):
            begin, first_steps, first_count = time.perf_counter(), engine.metrics().steps, sum(map(len, answers))
    seconds = time.perf_counter() - begin
    return Decoded(
        answers, seconds, int(engine.metrics().steps - first_steps), int(sum(map(len, answers)) - first_count)
    )


def measure_speculation(
    session: PagedSession,
    drafter: Drafter | DeviceDrafter,
    speculation: Speculation,
    batches: Sequence[Sequence[Sequence[int]]],
    *,
    new_tokens: int,
    sampling: Sampling | None = None,
    warmup: int = 1,
    on_sample: Callable[[int, int], None] = lambda done, total: None,
) -> SpeculationSpeed:
    """Continue batches of prompts with drafts and without; the first ones, `warmup`, are not counted.

    Args:
        drafter: of the session's model; it stays open.
        batches: more than `warmup`, of equal sizes.

    Raises:
        InputError: on a GPU, prompts that begin alike.
    """
    chosen, engine_of = sampling or Sampling(), _engines(session, drafter, speculation, batches)
    plain: list[Decoded] = []
    drafted: list[Decoded] = []
    figures: list[SpeculativeFigures] = []
    for number, prompts in enumerate(batches):
        turns = [False, True] if number % 2 else [True, False]
        for drafts in turns:
            engine = engine_of(drafts)
            before = engine.metrics().speculation
            found = decode(engine, prompts, new_tokens, chosen)
            (drafted if drafts else plain).append(found)
            counted = engine.metrics().speculation
            if counted is not None:
                assert before is not None
                figures.append(_since(before, counted))
        on_sample(number + 1, len(batches))
    pairs = list(zip(plain, drafted, strict=True))[warmup:]
    same = [own == other for a, b in pairs for own, other in zip(a.tokens, b.tokens, strict=True)]
    return SpeculationSpeed(
        speedup=median_rate([a.seconds / b.seconds for a, b in pairs]),
        step_cost=median_rate([(b.seconds / b.steps) / (a.seconds / a.steps) for a, b in pairs]),
        plain_tokens_per_s=median_rate([a.count / a.seconds for a, _ in pairs]),
        tokens_per_s=median_rate([b.count / b.seconds for _, b in pairs]),
        equal=statistics.fmean(same),
        figures=_sum(figures[warmup:]),
    )


def _engines(
    session: PagedSession,
    drafter: Drafter | DeviceDrafter,
    speculation: Speculation,
    batches: Sequence[Sequence[Sequence[int]]],
) -> Callable[[bool], Engine]:
    """The engine with drafts, or without, for the next sample; see the module."""

    def opened(drafts: bool) -> Engine:
        options = EngineOptions(max_running=len(batches[0]), speculation=speculation if drafts else None)
        return engine_for(session, options, drafter=drafter if drafts else None)

    if not session.model.on_device:
        return opened
    size = least_shared(session.model.block_size)
    begins = [tuple(prompt[:size]) for prompts in batches for prompt in prompts]
    if len(set(begins)) < len(begins):
        raise InputError(
            f"prompts begin with the same {size} tokens",
            why="one engine of each kind decodes all of them, and would find in the pool what the other has left",
            remedy="give a longer text, or fewer samples",
        )
    return functools.cache(opened)


def _since(before: SpeculativeFigures, after: SpeculativeFigures) -> SpeculativeFigures:
    """What counters of an engine got between two looks."""
    return msgspec.structs.replace(
        after,
        verified=after.verified - before.verified,
        drafted=after.drafted - before.drafted,
        drafted_at=np.subtract(after.drafted_at, before.drafted_at).tolist(),
        accepted_at=np.subtract(after.accepted_at, before.accepted_at).tolist(),
        draft_seconds=after.draft_seconds - before.draft_seconds,
    )


def _sum(parts: Sequence[SpeculativeFigures]) -> SpeculativeFigures:
    return SpeculativeFigures(
        method=parts[0].method,
        verified=sum(part.verified for part in parts),
        drafted=sum(part.drafted for part in parts),
        tree=parts[0].tree,
        drafted_at=np.sum([part.drafted_at for part in parts], axis=0).tolist(),
        accepted_at=np.sum([part.accepted_at for part in parts], axis=0).tolist(),
        draft_seconds=sum(part.draft_seconds for part in parts),
    )


def cut_prompts(tokens: Sequence[int], count: int, length: int) -> list[list[int]]:
    """Prompts from evenly spaced places of a text.

    Raises:
        InputError: the text is shorter than one prompt.
    """
    if len(tokens) < length:
        raise InputError(
            f"the text has {len(tokens)} tokens, fewer than a prompt of {length}",
            remedy="give a longer text or a smaller --prompt-length",
        )
    starts = np.linspace(0, len(tokens) - length, count).astype(int)
    return [list(tokens[start : start + length]) for start in starts]
