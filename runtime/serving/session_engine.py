"""The engine over a session whose cache is not paged: one request after another."""

from __future__ import annotations

import heapq
import time
from collections.abc import Sequence
from dataclasses import dataclass

from optc.compiler.ops.dialect.sampling import NO_TOKEN
from optc.runtime.serving.accepting import Limits, check_request
from optc.runtime.serving.answers import Answers
from optc.runtime.serving.engine_options import EngineOptions
from optc.runtime.serving.grammar import Grammars
from optc.runtime.serving.host_time import HostTime
from optc.runtime.serving.plan import Counts
from optc.runtime.serving.request import Answer, EngineInfo, EngineMetrics, Finish, Generate
from optc.runtime.serving.sampler import RequestSampler, answer_of, choose, sampler_of
from optc.runtime.sessions.session import Logits, Session


@dataclass(slots=True)
class _Job:
    """A request that waits or runs: it ends with `end` tokens."""

    request: Generate
    end: int
    end_reason: Finish
    sampler: RequestSampler | None
    tokens: list[int]


class SessionEngine:
    """One request at a time, by priority and then by arrival; each step is a prompt, or a token.

    The one that has waited for the longest is overtaken `patience` times at most. A prompt that begins as the row of the
    request before it is computed from there on.
    """

    def __init__(self, session: Session, options: EngineOptions, grammars: Grammars | None = None) -> None:
        context = min(session.context_length, options.max_context or session.context_length)
        self._session, self._patience, self._grammars = session, options.patience, grammars
        self._limits = Limits(session.vocab_size, context, options.max_waiting)
        self._waiting: dict[str, _Job] = {}  # by arrival
        self._ranked: list[tuple[int, int, _Job]] = []
        self._arrivals = self._overtaken = 0
        self._running: _Job | None = None
        self._held: list[int] = []  # the tokens of the session's row
        self._ended: list[Answer] = []
        self._counts, self._host = Counts(), HostTime()
        self.info = EngineInfo(
            vocab_size=session.vocab_size,
            context_length=context,
            serves="one-at-a-time",
            max_running=1,
            max_waiting=options.max_waiting,
            device=session.device_name,
        )

    def submit(self, request: Generate) -> None:
        """See `Engine`."""
        running = () if self._running is None else (self._running.request.id,)
        end, reason = check_request(request, self._limits, {*self._waiting, *running}, len(self._waiting))
        sampler = sampler_of(request, self._grammars)
        job = _Job(request, end, reason, sampler, list(request.prompt))
        self._waiting[request.id] = job
        heapq.heappush(self._ranked, (request.priority, self._arrivals, job))
        self._arrivals += 1

    def cancel(self, identity: str) -> None:
        """See `Engine`."""
        job = self._waiting.pop(identity, None)
        if job is None and self._running is not None and self._running.request.id == identity:
            job, self._running = self._running, None
        if job is not None:
            self._ended.append(self._answer(job, [], "cancelled"))

    def step(self) -> Answers:
        """See `Engine`."""
        answers, self._ended = self._ended, []
        self._advance(answers)
        return Answers.of(answers)

    def _advance(self, answers: list[Answer]) -> None:
        """A step of the request whose turn it is."""
        begin = time.perf_counter()
        job, cached = self._running, None
        if job is None:
            job = self._running = self._next()
        if job is None:
            return
        at = time.perf_counter()
        if len(job.tokens) > len(job.request.prompt):
            logits = self._session.decode(job.tokens[-1:])
        else:
            logits, cached = self._prefill(job)
        self._held = list(job.tokens) if cached is not None else [*self._held, job.tokens[-1]]
        computed = time.perf_counter() - at
        token = int(choose(logits, [job.sampler])[0])
        self._counts.steps += 1
        answers.append(self._take(job, token, cached))
        self._host.note(time.perf_counter() - begin - computed)

    def _next(self) -> _Job | None:
        """The one that is to run next, taken out of those that wait."""
        if not self._waiting:
            return None
        while self._ranked[0][2].request.id not in self._waiting:
            heapq.heappop(self._ranked)
        oldest = next(iter(self._waiting.values()))
        chosen = oldest if self._overtaken >= self._patience else self._ranked[0][2]
        self._overtaken = 0 if chosen is oldest else self._overtaken + 1
        del self._waiting[chosen.request.id]
        return chosen

    def _prefill(self, job: _Job) -> tuple[Logits, int]:
        """Logits of a prompt's last token, and how many tokens of it were there already."""
        common = _common(self._held, job.tokens[:-1])
        if self._session.keeps_states and [common] != self._session.lengths:
            common = 0
        self._counts.admissions += 1
        self._counts.prompt_tokens += len(job.tokens)
        self._counts.cached_tokens += common
        if not common:
            return self._session.prefill([job.tokens]), 0
        self._session.rewind([common])
        return self._session.extend([job.tokens[common:]]), common

    def _take(self, job: _Job, token: int, cached: int | None) -> Answer:
        if token == NO_TOKEN:
            self._held = []  # what is not finite would stay in the cache
            return self._answer(job, [], "error", cached)
        job.tokens.append(token)
        self._counts.generated_tokens += 1
        if token in job.request.stop_ids or (job.sampler is not None and job.sampler.complete):
            return self._answer(job, [token], "stop", cached)
        return self._answer(job, [token], job.end_reason if len(job.tokens) >= job.end else None, cached)

    def _answer(self, job: _Job, tokens: list[int], finish: Finish | None, cached: int | None = None) -> Answer:
        if finish is not None:
            self._counts.finished[finish] = self._counts.finished.get(finish, 0) + 1
            if job is self._running:
                self._running = None
        return answer_of(job.request.id, job.sampler, tokens, finish, cached)

    @property
    def idle(self) -> bool:
        """See `Engine`."""
        return self._running is None and not self._waiting and not self._ended

    def metrics(self) -> EngineMetrics:
        """See `Engine`."""
        running = 0 if self._running is None else 1
        return self._counts.metrics(running=running, waiting=len(self._waiting), host_us=self._host.mean_us)

    def close(self) -> None:
        """See `Engine`."""
        self._session.close()


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """Tokens at the beginning of both."""
    same = (a == b for a, b in zip(left, right, strict=False))
    return next((place for place, equal in enumerate(same) if not equal), min(len(left), len(right)))
