"""As `Drafting`, where drafts are made on the device: how many there are in a round, how many rounds, and what they gave."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from optc.runtime.serving.pace import Pace
from optc.runtime.serving.plan import Chosen, Plan
from optc.runtime.serving.round_runner import RoundRunner
from optc.runtime.serving.scheduler import Scheduler
from optc.runtime.speculative.counts import DraftCounts
from optc.runtime.speculative.device_drafter import DeviceDrafter
from optc.runtime.speculative.figures import SpeculativeFigures
from optc.runtime.speculative.settings import Speculation
from optc.runtime.speculative.shape import Ladder
from optc.runtime.speculative.switch import Outcome, Switch

_FIRST_ROUNDS, _MOST_ROUNDS, _MOST_PLAIN = 2, 4, 8
"""Of a step; see `Pace`. Rounds without drafts are short: as many as where nothing drafts hide the host as well."""
_SPARING = 8
"""See `Switch`: at another depth, rounds that were launched ahead are dropped."""


class RoundDrafting:
    """Drafts for the rows of a scheduler.

    Args:
        clock: seconds.
    """

    def __init__(
        self,
        drafter: DeviceDrafter,
        options: Speculation,
        scheduler: Scheduler,
        runner: RoundRunner,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._drafter, self._options, self._clock = drafter, options, clock
        self._scheduler, self._rows, self._runner = scheduler, scheduler.rows, runner
        self._ladder = Ladder.halves(options.draft_tokens)
        most = [_MOST_PLAIN, *[_MOST_ROUNDS] * len(self._ladder.rungs)]
        self._paces = [Pace(_FIRST_ROUNDS, rounds) for rounds in most]
        self._switch = Switch(self._ladder.rungs, sparing=_SPARING) if options.adaptive else None
        self._landed, self._waited, self._rung = 0.0, 0.0, 0
        self._counts = DraftCounts(options, self._switch, self._ladder)

    def propose(self) -> None:
        """Before a step is planned: ask for room for its rounds."""
        rows = self._rows
        ready = np.flatnonzero(rows.decoding & (rows.fed < rows.end - 1))
        if not len(ready):
            return
        self._rung = rung = len(self._ladder.rungs) if self._switch is None else self._switch.depth(len(ready))
        depth = len(self._ladder.rungs[rung - 1]) if rung else 0
        rounds = self._paces[rung].steps
        self._runner.depth, self._runner.rounds = depth, rounds
        # Rounds of this step and of the next, which are launched ahead; where all is kept, drafting goes on behind it.
        wanted = 2 * rounds * (depth + 1) - 1 + max(0, depth - 1)
        rows.drafted[ready] = np.minimum(wanted, rows.end[ready] - rows.known[ready] - 1)

    def note(self, plan: Plan, given: Chosen) -> None:
        """Behind a step, before its tokens are collected."""
        if given.rounds is None:
            return
        verified, kept, steady = given.rounds
        self._scheduler.counts.steps += len(kept) - 1  # each round is a step of the model
        places = np.arange(len(self._counts.drafted_at))
        self._counts.drafted_at += (verified[:, :, None] > places).sum((0, 1))
        self._counts.accepted_at += ((kept - 1)[:, :, None] > places).sum((0, 1))
        self._counts.verified += int((verified > 0).sum())
        self._counts.drafted += int(verified.sum())
        whole, waited = self._clock() - self._landed, self._runner.model_s - self._waited
        self._landed, self._waited = self._landed + whole, self._waited + waited
        if not steady:
            return
        seconds = whole / len(kept)  # since the step before, which was of the same rows: with all that the host does
        self._paces[self._rung].note(seconds, whole - waited)
        if self._switch is not None:
            outcomes = [Outcome(*item) for item in np.stack([verified, kept - 1], 2)[kept > 0].tolist()]
            self._switch.note(outcomes, seconds, rung=self._rung, rows=len(plan.decodes))

    def fix_rounds(self, rounds: int) -> None:
        """So many in a step from now on, for measuring."""
        for pace in self._paces:
            pace.fix(rounds)

    def forget(self, identity: str) -> None:
        """Nothing: drafts are the rows'."""

    def figures(self) -> SpeculativeFigures:
        """Since the start; what drafting takes is part of the rounds."""
        return self._counts.figures()

    def close(self) -> None:
        """The drafter ends, too."""
        self._drafter.close()
