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
from optc.runtime.speculative.shape import Ladder
from optc.runtime.speculative.switch import Outcome, Switch


class Drafting:
    """Drafts for the rows of a scheduler.

    Args:
        sampler_of: gives the sampler of a row, whose grammar its draft must hold to.
        ladder: the drafts to choose among.
        clock: seconds.
    """

    def __init__(
        self,
        drafter: Drafter,
        options: Speculation,
        scheduler: Scheduler,
        sampler_of: SamplerOf,
        ladder: Ladder,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._drafter, self._options, self._clock = drafter, options, clock
        self._scheduler, self._rows, self._sampler_of = scheduler, scheduler.rows, sampler_of
        self._reader = drafter if isinstance(drafter, ReadingDrafter) else None
        self._ladder = ladder
        self._switch = Switch(ladder.rungs) if options.adaptive else None
        self._begin, self._rung = 0.0, 0
        self._draft_s = 0.0
        self._counts = DraftCounts(options, self._switch, ladder)

    def propose(self) -> None:
        """Before a step is planned: draft for the rows that will be fed one token."""
        self._begin = self._clock()
        rows = self._rows
        ready = np.flatnonzero(rows.decoding & (rows.fed < rows.end - 1))
        if not len(ready):
            return
        self._rung = rung = len(self._ladder.rungs) if self._switch is None else self._switch.depth(len(ready))
        rows.shape = self._ladder.shapes[rung - 1] if rung and self._ladder.shapes is not None else None
        most = np.minimum(len(self._ladder.rungs[rung - 1]) if rung else 0, rows.end[ready] - rows.known[ready] - 1)
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
        ask = Ask(self._scheduler.at(row).id, rows.history[row, : rows.known[row]], most, shape=rows.shape)
        if sampler is None or sampler.request.sampling.greedy:
            return ask
        return ask._replace(sampling=sampler.request.sampling, uniforms=sampler.uniforms(most))

    def _usable(self, row: int, draft: Sequence[int]) -> Sequence[int]:
        """A draft up to a stop token, and up to what the grammar of its row lets follow; a tree is left as it is."""
        if self._rows.shape is not None:
            return draft
        stops = self._rows.stops[row].tolist()
        end = next((place + 1 for place, token in enumerate(draft) if token in stops), len(draft))
        sampler = self._sampler_of(row)
        if sampler is None or sampler.grammar is None or not draft:
            return draft[:end]
        return draft[: len(sampler.grammar.ahead(draft[:end])) - 1]

    def note(self, plan: Plan, given: Chosen) -> None:
        """Behind a step, before its tokens are collected."""
        begin = self._clock()
        made = plan.drafted > 0
        if made.any():
            self._counts.note(plan.drafted[made], given.counts[: len(made)][made] - 1, plan.shape)
            if plan.shape is None:
                self._drafter.observe(list(self._outcomes(plan, given)))
        if self._reader is not None:
            self._reader.read(list(self._fed(plan, given)))
        now = self._clock()
        self._draft_s += now - begin
        if self._switch is not None and len(plan.decodes) and not plan.pieces:
            self._switch.note(list(_row_outcomes(plan, given)), now - self._begin, rung=self._rung)

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
            at: slice | list[int] = slice(begin, begin + size)
            if given.path is not None:  # what was kept of a tree, as the text that it is now
                at = [begin + token for token in given.path[place, : given.counts[place]].tolist()]
            outputs = {role: rows[at] for role, rows in given.outputs.items()}
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


def _row_outcomes(plan: Plan, given: Chosen) -> Iterator[Outcome]:
    """What became of the draft of each row of a step of decodes."""
    for place, (drafted, count) in enumerate(zip(plan.drafted.tolist(), given.counts.tolist(), strict=True)):
        if plan.shape is None or given.path is None:
            yield Outcome(drafted, count - 1)
            continue
        nodes, kept = plan.shape.nodes, given.path[place, 1:count] - 1
        yield Outcome(drafted, count - 1, [nodes[token] for token in kept.tolist()])
