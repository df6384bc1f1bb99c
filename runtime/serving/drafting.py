"""What an engine does for speculation around each step: asks the drafter, and tells it and the counters what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from optc.runtime.serving.plan import Chosen, Plan
from optc.runtime.serving.sampler import SamplerOf
from optc.runtime.serving.scheduler import Scheduler
from optc.runtime.speculative.counts import DraftCounts
from optc.runtime.speculative.drafter import Ask, Drafter, Fed, ReadingDrafter, Verified
from optc.runtime.speculative.figures import SpeculativeFigures
from optc.runtime.speculative.settings import Speculation
from optc.runtime.speculative.switch import Outcome, Switch


class Drafting:
    """Drafts for the rows of a scheduler.

    Args:
        sampler_of: gives the sampler of a row, whose grammar its draft must hold to.
        clock: seconds.
    """

    def __init__(
        self,
        drafter: Drafter,
        options: Speculation,
        scheduler: Scheduler,
        sampler_of: SamplerOf,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._drafter, self._options, self._clock = drafter, options, clock
        self._scheduler, self._rows, self._sampler_of = scheduler, scheduler.rows, sampler_of
        self._switch = Switch(options.draft_tokens) if options.adaptive else None
        self._begin = 0.0
        self._draft_s = 0.0
        self._counts = DraftCounts(options, self._switch)

    def propose(self) -> None:
        """Before a step is planned: draft for the rows that will be fed one token."""
        self._begin = self._clock()
        rows = self._rows
        ready = np.flatnonzero(rows.decoding & (rows.fed < rows.end - 1))
        if not len(ready):
            return
        depth = self._options.draft_tokens if self._switch is None else self._switch.depth(len(ready))
        most = np.minimum(depth, rows.end[ready] - rows.known[ready] - 1)
        asks = {
            row: self._ask(row, count) for row, count in zip(ready.tolist(), most.tolist(), strict=True) if count > 0
        }
        if not asks:
            return
        for (row, ask), draft in zip(asks.items(), self._drafter.propose(list(asks.values())), strict=True):
            usable = self._usable(row, draft[: ask.most])
            if usable:
                rows.draft(row, usable)
        self._draft_s += self._clock() - self._begin

    def _ask(self, row: int, most: int) -> Ask:
        rows, sampler = self._rows, self._sampler_of(row)
        ask = Ask(self._scheduler.at(row).id, rows.history[row, : rows.known[row]], most)
        if sampler is None or sampler.request.sampling.greedy:
            return ask
        return ask._replace(sampling=sampler.request.sampling, uniforms=sampler.uniforms(most))

    def _usable(self, row: int, draft: Sequence[int]) -> Sequence[int]:
        """A draft up to a stop token, and up to what the grammar of its row lets follow."""
        stops = self._rows.stops[row].tolist()
        end = next((place + 1 for place, token in enumerate(draft) if token in stops), len(draft))
        sampler = self._sampler_of(row)
        if sampler is None or sampler.grammar is None or not draft:
            return draft[:end]
        return draft[: len(sampler.grammar.ahead(draft[:end])) - 1]

    def note(self, plan: Plan, given: Chosen) -> None:
        """Behind a step, before its tokens are collected."""
        begin = self._clock()
        verified = list(self._outcomes(plan, given))
        for item in verified:
            self._counts.drafted_at[: len(item.drafted)] += 1
            self._counts.accepted_at[: item.accepted] += 1
        self._counts.verified += len(verified)
        if verified:
            self._drafter.observe(verified)
        if isinstance(self._drafter, ReadingDrafter):
            self._drafter.read(list(self._fed(plan, given)))
        now = self._clock()
        self._draft_s += now - begin
        if self._switch is not None and len(plan.decodes) and not plan.pieces:
            accepted = (given.counts - 1).tolist()
            outcomes = [Outcome(*row) for row in zip(plan.drafted.tolist(), accepted, strict=True)]
            self._switch.note(outcomes, now - self._begin)

    def _outcomes(self, plan: Plan, given: Chosen) -> Iterator[Verified]:
        rows = self._rows
        for place in np.flatnonzero(plan.drafted).tolist():
            row, count = int(plan.decodes[place]), int(plan.drafted[place])
            known = int(rows.known[row])
            yield Verified(
                self._scheduler.at(row).id,
                rows.history[row, :known],
                rows.history[row, known : known + count],
                given.tokens[place, : count + 1],
                int(given.counts[place]) - 1,
            )

    def _fed(self, plan: Plan, given: Chosen) -> Iterator[Fed]:
        """What the program gave at each request's tokens, whose rows lie end to end: decodes, then pieces of prompts."""
        whole = {role for role, rows in given.outputs.items() if len(rows) == plan.tokens}
        begin = 0
        for place, row in enumerate(plan.decodes.tolist()):
            size = 1 + int(plan.drafted[place])
            outputs = {role: rows[begin : begin + size] for role, rows in given.outputs.items()}
            yield Fed(self._scheduler.at(row).id, int(plan.positions[place]), int(given.counts[place]), outputs)
            begin += size
        picked = begin
        for piece in plan.pieces:
            name, first = self._scheduler.at(piece.row).id, piece.size - int(piece.last)
            if whole and first:
                part = {role: given.outputs[role][begin : begin + first] for role in whole}
                yield Fed(name, piece.start, first, part)
            if piece.last:
                places = {role: begin + first if role in whole else picked for role in given.outputs}
                last = {role: given.outputs[role][at : at + 1] for role, at in places.items()}
                yield Fed(name, piece.start + first, 1, last)
            begin, picked = begin + piece.size, picked + int(piece.last)

    def forget(self, identity: str) -> None:
        """A request has ended."""
        self._drafter.forget(identity)

    def figures(self) -> SpeculativeFigures:
        """Since the start."""
        return self._counts.figures(self._draft_s)

    def close(self) -> None:
        """The drafter ends, too."""
        self._drafter.close()
