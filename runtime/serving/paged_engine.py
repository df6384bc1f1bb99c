"""The engine over a paged program: requests join and leave at every step."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import msgspec
import numpy as np

from optc.compiler.execution.block_manager import BlockManager
from optc.runtime.serving.accepting import Limits, check_request
from optc.runtime.serving.answers import Answers
from optc.runtime.serving.drafting import Drafting
from optc.runtime.serving.engine_options import EngineOptions
from optc.runtime.serving.grammar import Grammars
from optc.runtime.serving.host_time import HostTime
from optc.runtime.serving.model_runner import ModelRunner
from optc.runtime.serving.plan import Ended, Plan, Request
from optc.runtime.serving.request import Answer, EngineInfo, EngineMetrics, Finish, Generate
from optc.runtime.serving.round_drafting import RoundDrafting
from optc.runtime.serving.round_runner import RoundRunner
from optc.runtime.serving.rows import Rows
from optc.runtime.serving.sampler import RequestSampler, SamplerOf, answer_of, kind_of, sampler_of
from optc.runtime.serving.scheduler import Scheduler
from optc.runtime.sessions.paged import PagedModel
from optc.runtime.speculative.device_drafter import DeviceDrafter
from optc.runtime.speculative.drafter import Drafter, ReadingDrafter
from optc.runtime.speculative.shape import ladder_of


@dataclass(slots=True)
class _Entry:
    """What the engine keeps of a request beside its schedule."""

    scheduled: Request
    sampler: RequestSampler | None


class PagedEngine:
    """Continuous batching; see `scheduler` for the order, `model_runner` for what a step runs.

    Args:
        open_runner: makes what runs the steps, from the rows it reads and what gives the sampler of a row.
        drafter: guesses tokens, as `options.speculation` says; None for plain decoding. The engine's from then on.
    """

    def __init__(
        self,
        model: PagedModel,
        options: EngineOptions,
        open_runner: Callable[[PagedModel, Rows, SamplerOf], ModelRunner],
        *,
        grammars: Grammars | None = None,
        drafter: Drafter | DeviceDrafter | None = None,
        on_close: Callable[[], None] = lambda: None,
        device: str = "",
        copied_bytes: int = 0,
    ) -> None:
        room = model.num_blocks * model.block_size
        capacity = min(model.context_length, room, options.max_context or room)
        self._limits = Limits(model.vocab_size, capacity, options.max_waiting)
        running, budget = options.batch(on_device=model.on_device)
        rows = Rows(running, capacity, model.block_size)
        self._rows, self._on_close, self._grammars = rows, on_close, grammars
        self._entries: dict[str, _Entry] = {}
        self._grammatical: dict[str, _Entry] = {}
        self._runner = open_runner(model, rows, self._sampler_of)
        budget = max(min(budget, model.chunk), running + 1)
        self.scheduler = Scheduler(
            BlockManager(model.num_blocks, model.block_size),
            rows,
            token_budget=budget,
            ahead=self._runner.ahead,
            compact=self._runner.ahead > 0,
            patience=options.patience,
            forks=not isinstance(drafter, DeviceDrafter | ReadingDrafter),  # what these hold of tokens is not copied
        )
        self._drafting: Drafting | RoundDrafting | None = None
        if drafter is not None:
            assert options.speculation is not None
            assert not self._runner.ahead
            asked = options.speculation
            speculation = asked if asked.draft_tokens else msgspec.structs.replace(asked, draft_tokens=model.heads)
            if isinstance(self._runner, RoundRunner):
                assert isinstance(drafter, DeviceDrafter)
                self._drafting = RoundDrafting(drafter, speculation, self.scheduler, self._runner)
            else:
                assert not isinstance(drafter, DeviceDrafter)
                ladder = ladder_of(speculation, model.tree)
                self._drafting = Drafting(drafter, speculation, self.scheduler, self._sampler_of, ladder)
        if options.warm_up:
            self._runner.warm_up(budget)
        self._launched: deque[Plan] = deque()
        self._ended: list[Ended] = []
        self._host = HostTime()
        self.info = EngineInfo(
            vocab_size=model.vocab_size,
            context_length=capacity,
            serves="continuous",
            max_running=running,
            max_waiting=options.max_waiting,
            block_size=model.block_size,
            num_blocks=model.num_blocks,
            device=device,
            dequantized_bytes=copied_bytes,
        )

    # -- requests ---------------------------------------------------------------------------

    def submit(self, request: Generate) -> None:
        """See `Engine`."""
        end, reason = check_request(request, self._limits, self._entries, self.scheduler.waiting)
        sampler = sampler_of(request, self._grammars)
        scheduled = Request(
            id=request.id,
            tokens=list(request.prompt),
            prompt_length=len(request.prompt),
            end=end,
            end_reason=reason,
            stops=list(request.stop_ids),
            priority=request.priority,
            single=request.grammar is not None,  # what may follow depends on the token
            kind=kind_of(request),
            told=len(request.prompt),
        )
        entry = self._entries[request.id] = _Entry(scheduled, sampler)
        if request.grammar is not None:
            self._grammatical[request.id] = entry
        self.scheduler.add(scheduled)

    def cancel(self, identity: str) -> None:
        """See `Engine`."""
        ended = self.scheduler.cancel(identity)
        if ended is not None:
            self._ended.append(ended)

    def _sampler_of(self, row: int) -> RequestSampler | None:
        return self._entries[self.scheduler.at(row).id].sampler

    # -- steps ------------------------------------------------------------------------------

    def step(self) -> Answers:
        """See `Engine`."""
        begin, computed = time.perf_counter(), self._runner.model_s
        if self._drafting is not None:
            self._drafting.propose()
        plan = self.scheduler.plan(self._runner.most_steps)
        if plan is not None:
            self._runner.launch(plan)
            self._launched.append(plan)
        answers = Answers.of([])
        if self._launched and (plan is None or len(self._launched) > self._runner.ahead):
            oldest = self._launched.popleft()
            given = self._runner.collect()
            if self._drafting is not None:
                self._drafting.note(oldest, given)
            self._ended += self.scheduler.collect(oldest, given)
            self._end_complete()
            answers = self._tell(oldest)
        answers.others.extend(self._last(ended) for ended in self._ended)
        self._ended.clear()
        self._host.note(
            time.perf_counter() - begin - (self._runner.model_s - computed), 1 if plan is None else plan.steps
        )
        return answers

    def _end_complete(self) -> None:
        """End the requests whose grammars allow nothing more."""
        for identity, entry in list(self._grammatical.items()):
            if entry.sampler is not None and entry.sampler.complete:
                ended = self.scheduler.end(identity, "stop")
                self._ended += [] if ended is None else [ended]
                del self._grammatical[identity]

    def _tell(self, plan: Plan) -> Answers:
        """The new tokens of every request that goes on; those that have moved tell theirs with the next one."""
        rows = self._rows
        here = plan.rows[rows.serial[plan.rows] == plan.serials]
        plain = rows.plain[here]
        others = [self._more(row) for row in here[~plain].tolist()]
        here = here[plain]
        return Answers(rows.names[here].tolist(), *rows.tell(here), others)

    def _more(self, row: int) -> Answer:
        """The answer of a row that may hold more than tokens."""
        rows, entry = self._rows, self._entries[self.scheduler.at(row).id]
        first = int(rows.told[row]) == entry.scheduled.prompt_length
        tokens, _ = rows.tell(np.array([row]))
        answer = self._answer(entry, tokens.tolist(), None, first=first)
        rows.plain[row] = answer.logprobs is None
        return answer

    def _last(self, ended: Ended) -> Answer:
        """All that was not told of a request, and why it ended."""
        entry = self._entries.pop(ended.request.id)
        if self._drafting is not None:
            self._drafting.forget(ended.request.id)
        self._grammatical.pop(ended.request.id, None)
        told = entry.scheduled.told
        first = told == entry.scheduled.prompt_length
        return self._answer(entry, ended.tokens[told:], ended.finish, first=first)

    @staticmethod
    def _answer(entry: _Entry, tokens: list[int], finish: Finish | None, *, first: bool) -> Answer:
        scheduled = entry.scheduled
        return answer_of(scheduled.id, entry.sampler, tokens, finish, scheduled.found if first else None)

    @property
    def idle(self) -> bool:
        """See `Engine`."""
        return not self._entries and not self._launched

    def metrics(self) -> EngineMetrics:
        """See `Engine`."""
        scheduler = self.scheduler
        return scheduler.counts.metrics(
            running=scheduler.running,
            waiting=scheduler.waiting,
            used_blocks=scheduler.manager.used_blocks,
            host_us=self._host.mean_us,
            speculation=None if self._drafting is None else self._drafting.figures(),
        )

    def close(self) -> None:
        """See `Engine`."""
        self._entries.clear()
        if self._drafting is not None:
            self._drafting.close()
        self._on_close()
