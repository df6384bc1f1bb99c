"""A batch of prompts through an engine, from the first token to the last."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from optc.compiler.diagnostics import GateError
from optc.compiler.settings.fields import check_range
from optc.runtime.bounds import Count
from optc.runtime.generation.generate import GenerationResult, OnToken, StopReason
from optc.runtime.sampling import Sampling
from optc.runtime.serving.interface import Engine
from optc.runtime.serving.request import Answer, Finish, Generate
from optc.runtime.serving.seeds import choice_seed

_STOPS: dict[Finish, StopReason] = {"stop": "stop-token", "length": "length", "context": "context"}


def generate_through(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_ids: Collection[int] = (),
    on_token: OnToken | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> GenerationResult:
    """Continue prompts, as `generate` does over a session. Of equal prompts the first has the seed, each of the others one
    that follows from it.

    `tpot_ms` is of the longest answer, by tokens: a step may give several.

    Raises:
        UsageError, InputError: as `Engine.submit`.
        GateError: logits that are not finite.
    """
    check_range("max-new-tokens", max_new_tokens, Count)
    rows = _Rows(len(prompts), on_token)
    begin, steps = clock(), engine.metrics().steps
    first = begin
    for request in _requests(prompts, max_new_tokens, sampling or Sampling(), stop_ids):
        engine.submit(request)
    while not engine.idle:
        for answer in engine.step():
            rows.take(answer)
        if first == begin and any(rows.tokens):
            first = clock()
    longest = max(map(len, rows.tokens), default=0)
    return GenerationResult(
        tokens=rows.tokens,
        stop=rows.stop,
        ttft_ms=(first - begin) * 1e3,
        tpot_ms=(clock() - first) * 1e3 / (longest - 1) if longest > 1 else None,
        steps=engine.metrics().steps - steps,
    )


def _requests(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, sampling: Sampling, stop_ids: Collection[int]
) -> list[Generate]:
    seen: Counter[tuple[int, ...]] = Counter()
    found = []
    for row, prompt in enumerate(prompts):
        seed = choice_seed(sampling.seed, seen[tuple(prompt)])
        seen[tuple(prompt)] += 1
        found.append(
            Generate(
                id=str(row),
                prompt=list(prompt),
                max_new_tokens=max_new_tokens,
                sampling=replace(sampling, seed=seed),
                stop_ids=list(stop_ids),
            )
        )
    return found


class _Rows:
    """What each prompt has so far."""

    def __init__(self, count: int, on_token: OnToken | None) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        self.stop: list[StopReason] = ["length"] * count
        self._on_token = on_token

    def take(self, answer: Answer) -> None:
        row = int(answer.id)
        if answer.finish == "error":
            raise GateError(answer.error, where=f"row {row}", remedy="leave the request out, or run it by itself")
        self.tokens[row] += answer.tokens
        if answer.finish is not None:
            self.stop[row] = _STOPS[answer.finish]
        if self._on_token is not None:
            for token in answer.tokens:
                self._on_token(row, token)
