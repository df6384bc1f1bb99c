"""As `Drafting`, where drafts are made on the device: how many there are in a round, how many rounds, and what they gave."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable

import numpy as np

from optc.runtime.serving.plan import Chosen, Plan
from optc.runtime.serving.round_runner import RoundRunner
from optc.runtime.serving.scheduler import Scheduler
from optc.runtime.speculative.counts import DraftCounts
from optc.runtime.speculative.device_drafter import DeviceDrafter
from optc.runtime.speculative.figures import SpeculativeFigures
from optc.runtime.speculative.settings import Speculation
from optc.runtime.speculative.switch import Outcome, Switch

_STEP_SECONDS, _MOST_ROUNDS = 1.2e-3, 4
"""What the rounds of a step should take, so that what the host does in that time is hidden; and how many there are at most."""
_LOOKED_AT = 16
"""Steps after which their rounds are counted anew."""
_SPARING = 8
"""See `Switch`: at another depth, rounds that were launched ahead are dropped."""


class RoundDrafting:
    """Drafts for the rows of a scheduler.

    Attributes:
        rounds: of a step.
        fixed: they stay so many, for measuring.

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
        self.rounds, self.fixed = 2, False
        self._took: list[float] = []  # seconds of a round in the last steps
        self._switch = Switch(options.draft_tokens, sparing=_SPARING) if options.adaptive else None
        self._begin = 0.0
        self._counts = DraftCounts(options, self._switch)

    def propose(self) -> None:
        """Before a step is planned: ask for room for its rounds."""
        self._begin = self._clock()
        rows = self._rows
        ready = np.flatnonzero(rows.decoding & (rows.fed < rows.end - 1))
        if not len(ready):
            return
        depth = self._options.draft_tokens if self._switch is None else self._switch.depth(len(ready))
        rounds = self.rounds
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
        if not steady:
            return
        seconds = (self._clock() - self._begin) / len(kept)
        self._pace(seconds)
        if self._switch is not None:
            outcomes = [Outcome(*item) for item in np.stack([verified, kept - 1], 2)[kept > 0].tolist()]
            self._switch.note(outcomes, seconds, rows=len(plan.decodes))

    def _pace(self, seconds: float) -> None:
        """Count the rounds of the next steps by what a round takes."""
        self._took.append(seconds)
        if len(self._took) == _LOOKED_AT:
            if not self.fixed:
                self.rounds = min(_MOST_ROUNDS, math.ceil(_STEP_SECONDS / statistics.median(self._took)))
            self._took.clear()

    def forget(self, identity: str) -> None:
        """Nothing: drafts are the rows'."""

    def figures(self) -> SpeculativeFigures:
        """Since the start; what drafting takes is part of the rounds."""
        return self._counts.figures()

    def close(self) -> None:
        """The drafter ends, too."""
        self._drafter.close()
