"""Runs steps whose drafts are made on the device: a step of decodes is some rounds of drafts, one behind the other.

The host reads what all rounds of a step gave at once, while those of the next step run: they need nothing from it, and are
dropped where the next step is not of the same rows. A step with prompts, or with a row whose tokens are decided on the host
or look at those before them, is a call without drafts, which the drafter follows.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import numpy as np
import torch

from optc.compiler.ops.dialect.sampling import NO_TOKEN
from optc.runtime.serving.device_runner import DeviceRunner, one_each, step_rows
from optc.runtime.serving.flights import Flight
from optc.runtime.serving.mixed_call import MixedCall
from optc.runtime.serving.plan import Chosen, Plan, Rounds
from optc.runtime.serving.round import Round
from optc.runtime.serving.rows import Ints, Kind, Rows
from optc.runtime.serving.sampler import SamplerOf
from optc.runtime.sessions.paged import PagedModel
from optc.runtime.speculative.device_drafter import DeviceDrafter
from optc.runtime.speculative.shape import Ladder


@dataclass(frozen=True)
class _Ahead:
    """Rounds behind those of the step that was launched last, for a next one of the same rows.

    Attributes:
        this, count: so many of this round. rows, serials: of the step, see `Plan`.
    """

    this: Round
    count: int
    rows: Ints
    serials: Ints
    flight: Flight

    def is_of(self, this: Round, count: int, plan: Plan) -> bool:
        """Whether they are what a step asks for."""
        same = self.this is this and self.count == count and not plan.moved
        return same and np.array_equal(self.rows, plan.rows) and np.array_equal(self.serials, plan.serials)


def _nothing(_: Ints) -> Chosen:
    raise AssertionError("a flight that no step has taken")


class RoundRunner(DeviceRunner):
    """See above.

    Args:
        most: tokens that are drafted in a round.

    Attributes:
        round_type: of its rounds. depth: of those of the next step. rounds: so many.
    """

    round_type: type[Round] = Round

    def __init__(
        self, model: PagedModel, rows: Rows, sampler_of: SamplerOf, *, drafter: DeviceDrafter, most: int
    ) -> None:
        super().__init__(model, rows, sampler_of, drafts=True)
        self._drafter, self._most = drafter, most
        self.depth, self.rounds = most, 1
        self._drafts = torch.zeros((rows.count, max(1, most)), dtype=torch.int64, device=model.device)
        self._ready = np.full((3, rows.count), -1)  # serial, position and tokens of the drafts on the device
        self._ahead: _Ahead | None = None
        self._rounds: dict[tuple[int, int, int, Kind], Round] = {}

    @torch.inference_mode()
    def warm_up(self, most_tokens: int) -> None:
        """As `DeviceRunner`, of rounds; those without drafts are wanted where others are measured against them."""
        if self._model.record is None:
            return
        count = self._rows.count
        for batch in {step_rows(rows, count) for rows in range(1, count + 1)}:
            for depth in (0, *map(len, Ladder.halves(self._most).rungs)):
                self._round(batch, self._width(1), depth, Kind.GREEDY)
        self._warm_up_calls(most_tokens)

    def _brings_tokens(self, plan: Plan, kind: Kind) -> bool:
        return self._in_rounds(plan, kind)

    @staticmethod
    def _in_rounds(plan: Plan, kind: Kind) -> bool:
        return not plan.pieces and kind < Kind.PENALIZED

    def _start(self, plan: Plan, kind: Kind) -> Flight:
        if self._in_rounds(plan, kind):
            return self._start_rounds(plan, kind)
        self._give_up()
        plain = dataclasses.replace(plan, drafted=np.zeros_like(plan.drafted))
        tokens, order, tell = self._mixed(plain, kind)
        return self._flights.of(tokens, order, functools.partial(one_each, tell))

    def _call(self, size: tuple[int, int], kind: Kind, *, every: bool = False) -> MixedCall:
        key = (size, kind, every)
        if key not in self._calls:
            self._calls[key] = MixedCall(self._model, self._buffers, size, kind, follow=self._drafter.follow)
        return self._calls[key]

    def _tokens_behind(self, plan: Plan, arrays: list[np.ndarray]) -> Ints:
        ids, bounds = arrays[0], arrays[5]
        behind = np.append(ids[1:], 0)
        last = bounds[1:].astype(np.int64) - 1
        behind[last] = -1 - np.arange(len(last))
        for place, piece in enumerate(plan.pieces, len(plan.decodes)):
            if not piece.last:
                behind[last[place]] = self._rows.history[piece.row, piece.start + piece.size]
        return behind

    # -- rounds -----------------------------------------------------------------------------

    def _start_rounds(self, plan: Plan, kind: Kind) -> Flight:
        """The rounds of a step, which may have been launched already; and those of a next one that is like it."""
        rows, limits = plan.decodes, plan.positions + 1 + plan.drafted
        batch, depth = step_rows(int(rows[-1]) + 1, self._rows.count), self.depth
        this = self._round(batch, self._width(int(limits.max())), depth, kind)
        count = min(self.rounds, 1 + int(plan.drafted.max()))
        ahead = self._ahead
        steady = ahead is not None and ahead.is_of(this, count, plan)
        if ahead is not None and steady:
            limit = np.zeros(batch, np.int64)
            limit[rows] = limits
            this.extend(self._buffers.send(limit))
            flight = ahead.flight
        else:
            self._give_up()
            this.load(self._buffers.send(self._heads(plan, batch, limits)))
            flight = self._run(this, count)
        flight.given = functools.partial(self._gathered, plan, depth, steady)
        self._ahead = None
        if (limits - plan.positions > count * (depth + 1)).all():  # no row stands still in all of the next rounds
            self._ahead = _Ahead(this, count, rows, plan.serials, self._run(this, count))
        self.captured += this.recorded
        self._buffers.overtaken()
        return flight

    def _heads(self, plan: Plan, batch: int, limits: Ints) -> Ints:
        """Where rows stand, as rounds begin."""
        rows, heads = plan.decodes, np.zeros((4, batch), np.int64)
        known = (self._ready[0, rows] == self._rows.serial[rows]) & (self._ready[1, rows] == plan.positions)
        heads[0, rows], heads[1, rows] = self._rows.history[rows, plan.positions], plan.positions
        heads[2, rows], heads[3, rows] = limits, np.where(known, self._ready[2, rows], 0)
        return heads

    def _run(self, this: Round, count: int) -> Flight:
        outcomes = torch.empty((count, this.batch, this.depth + 3), dtype=torch.int64, device=self._model.device)
        for place in range(count):
            this.run()
            outcomes[place].copy_(this.outcome)
        return self._flights.of(outcomes, np.arange(count), _nothing)

    def _give_up(self) -> None:
        """Rounds that were launched ahead are not those of the next step: what they gave is dropped. They wrote behind the
        tokens that rows have, which are written again."""
        if self._ahead is not None:
            self._ahead = None
            self._ready[:] = -1

    def _round(self, batch: int, width: int, depth: int, kind: Kind) -> Round:
        key = (batch, width, depth, kind)
        if key not in self._rounds:
            draws = self._buffers.draws(kind)
            state = self._buffers.state.first(batch, width)
            self._rounds[key] = self.round_type(self._model, self._drafter, state, self._drafts, depth, draws)
        return self._rounds[key]

    def _gathered(self, plan: Plan, depth: int, steady: bool, outcomes: Ints) -> Chosen:
        """What rounds gave, from [M, B, depth + 3], row by row."""
        rows, width = plan.decodes, depth + 1
        found = outcomes[:, rows].transpose(1, 0, 2)
        kept = found[:, :, width]
        real = np.arange(width) < kept[:, :, None]
        counts = kept.sum(1)
        tokens = np.full((len(rows), int(counts.max())), NO_TOKEN, np.int64)
        tokens[np.arange(tokens.shape[1]) < counts[:, None]] = found[:, :, :width][real]
        self._ready[:, rows] = self._rows.serial[rows], plan.positions + counts, np.where(kept[:, -1] > 0, depth, 0)
        chosen = Chosen(tokens, counts, rounds=Rounds(found[:, :, width + 1].T, kept.T, steady))
        self._go_on(plan, chosen)
        return chosen
