"""Generation over any session: ragged batches, stop tokens, streaming, timing."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from optc.compiler.diagnostics import UsageError
from optc.compiler.settings.fields import check_range
from optc.runtime.bounds import Count
from optc.runtime.generation.sampling import Sampler, draws_of
from optc.runtime.sampling import Sampling
from optc.runtime.sessions.session import Logits, Rows, Session
from optc.runtime.sessions.streaming import Draw, StreamingSession

StopReason = Literal["stop-token", "length", "context"]
OnToken = Callable[[int, int], None]
"""Called with (row, token) as each token is chosen."""


@dataclass(frozen=True)
class GenerationResult:
    """What was generated, row by row.

    Attributes:
        tokens: generated ids, a final stop token included.
        stop: why each row ended: a stop token, `max_new_tokens`, or a full context.
        ttft_ms: from the call to the first token chosen.
        tpot_ms: mean time per step after the first token; None when there was no such step.
        steps: decode steps of the batch.
    """

    tokens: list[list[int]]
    stop: list[StopReason]
    ttft_ms: float
    tpot_ms: float | None
    steps: int


def generate(
    session: Session,
    prompts: Rows,
    *,
    max_new_tokens: int,
    sampling: Sampling | Sequence[Sampling] | None = None,
    stop_ids: Collection[int] = (),
    on_token: OnToken | None = None,
    held: Sequence[int] | None = None,
) -> GenerationResult:
    """Prefill the prompts and decode until every row has stopped.

    Sessions that choose tokens themselves are asked to; a row that has stopped stays as it is then. In others it is fed
    a filler token that is rewound at once. Either way the others go on as if they were alone, and afterwards each row of
    the session holds its prompt and all generated tokens but the last (a row whose context was full may have lost one
    more).

    Args:
        sampling: how tokens are chosen, of all rows or of each; None is greedy.
        held: how many tokens of each prompt the session's rows begin with already, fewer than all of it; they are not
            computed again, and what the rows hold beyond is forgotten. None starts over.

    Raises:
        UsageError: `max_new_tokens` below 1, or what is not one `Sampling` for each prompt.
        InputError: prompts that the session refuses.
        GateError: logits that are not finite.
    """
    check_range("max-new-tokens", max_new_tokens, Count)
    samplings, continued = _per_row(sampling, len(prompts)), session.continued(prompts)
    batch = _Batch(session, stop_ids, max_new_tokens, on_token)
    begin = time.perf_counter()
    logits = session.prefill(prompts) if held is None else _continued(session, prompts, held)
    if isinstance(session, StreamingSession):
        draws = draws_of(samplings, continued)
        batch.take(session.choose(logits, draws))
        first = time.perf_counter()
        steps = batch.stream(session, draws)
    else:
        sampler, steps = Sampler(samplings, continued), 0
        batch.take(sampler(logits))
        first = time.perf_counter()
        while batch.running:
            batch.take(sampler(batch.step()))
            steps += 1
    end = time.perf_counter()
    return GenerationResult(
        tokens=batch.tokens,
        stop=[reason or "length" for reason in batch.stop],
        ttft_ms=(first - begin) * 1e3,
        tpot_ms=(end - first) * 1e3 / steps if steps else None,
        steps=steps,
    )


def _continued(session: Session, prompts: Rows, held: Sequence[int]) -> Logits:
    if session.keeps_states and list(held) != session.lengths:
        return session.prefill(prompts)
    session.rewind(held)
    return session.extend([prompt[count:] for prompt, count in zip(prompts, held, strict=True)])


def _per_row(sampling: Sampling | Sequence[Sampling] | None, rows: int) -> list[Sampling]:
    if sampling is None or isinstance(sampling, Sampling):
        return [sampling or Sampling()] * rows
    samplings, remedy = list(sampling), "give one Sampling for all, or one for each"
    if len(samplings) != rows:
        raise UsageError(f"{len(samplings)} samplings for {rows} prompt(s)", remedy=remedy)
    for row, item in enumerate(samplings):
        if not isinstance(item, Sampling):
            raise UsageError(f"the sampling of row {row} is {item!r:.60}", remedy=remedy)
    return samplings


class _Batch:
    """Which rows run, and what each has so far."""

    def __init__(
        self, session: Session, stop_ids: Collection[int], max_new_tokens: int, on_token: OnToken | None
    ) -> None:
        self._session, self._on_token = session, on_token
        self._stop_ids, self._limit = frozenset(stop_ids), max_new_tokens
        self.tokens: list[list[int]] = []
        self.stop: list[StopReason | None] = []
        self.running = 0

    def take(self, chosen: Sequence[int | None]) -> None:
        """Note the chosen token of every running row, and whether the row ends with it."""
        if not self.tokens:
            self.tokens, self.stop = [[] for _ in chosen], [None for _ in chosen]
        for row, token in enumerate(chosen):
            if self.stop[row] is not None or token is None:
                continue
            self.tokens[row].append(token)
            if self._on_token is not None:
                self._on_token(row, token)
            self.stop[row] = self._reason(row, token)
        self.running = self.stop.count(None)

    def _reason(self, row: int, token: int) -> StopReason | None:
        if token in self._stop_ids:
            return "stop-token"
        if len(self.tokens[row]) >= self._limit:
            return "length"
        return "context" if self._session.lengths[row] >= self._session.context_length else None

    def stream(self, session: StreamingSession, draws: Sequence[Draw]) -> int:
        """Let the session choose until every row has stopped; returns the number of steps."""
        steps = 0
        while self.running:
            rows, running = list(zip(self.tokens, self.stop, strict=True)), self.running
            fed = [None if reason else row[-1] for row, reason in rows]
            left = self._limit - max(len(row) for row, reason in rows if not reason)
            for chosen in session.stream(fed, left, draws):
                self.take(chosen)
                steps += 1
                if self.running < running:  # from here on without the rows that stopped
                    break
        return steps

    def step(self) -> Logits:
        """Feed every row its last token; logits [B, V]. A row that has stopped stays as it was.

        The logits of a stopped row mean nothing.
        """
        if not any(self.stop):
            return self._session.decode([row[-1] for row in self.tokens])
        return self._session.decode_running(
            [None if reason else row[-1] for row, reason in zip(self.tokens, self.stop, strict=True)]
        )
