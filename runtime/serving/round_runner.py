"""Runs steps whose drafts are made on the device: a step of decodes is some rounds of drafts, one behind the other.

The host reads what all rounds of a step gave at once. A step with prompts, or with a row whose tokens are decided on the host
or look at those before them, is a call without drafts, which the drafter follows.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import torch
from torch import Tensor

from optc.compiler.ops.dialect.sampling import NO_TOKEN
from optc.runtime.serving.device_runner import DeviceRunner, Given, one_each, step_rows
from optc.runtime.serving.mixed_call import MixedCall
from optc.runtime.serving.plan import Chosen, Plan, Rounds
from optc.runtime.serving.round import Round
from optc.runtime.serving.rows import Ints, Kind, Rows
from optc.runtime.serving.sampler import SamplerOf
from optc.runtime.sessions.paged import PagedModel
from optc.runtime.speculative.device_drafter import DeviceDrafter


class RoundRunner(DeviceRunner):
    """See above.

    Args:
        most: tokens that are drafted in a round.

    Attributes:
        depth: of the rounds of the next step. rounds: so many.
    """

    def __init__(
        self, model: PagedModel, rows: Rows, sampler_of: SamplerOf, *, drafter: DeviceDrafter, most: int
    ) -> None:
        super().__init__(model, rows, sampler_of, drafts=True)
        self._drafter, self._most = drafter, most
        self.depth, self.rounds = most, 1
        self._drafts = torch.zeros((rows.count, max(1, most)), dtype=torch.int64, device=model.device)
        self._ready = np.full((3, rows.count), -1)  # serial, position and tokens of the drafts on the device
        self._rounds: dict[tuple[int, int, int, Kind], Round] = {}

    @torch.inference_mode()
    def warm_up(self, most_tokens: int) -> None:
        """As `DeviceRunner`, of rounds."""
        if self._model.record is None:
            return
        count = self._rows.count
        for batch in {step_rows(rows, count) for rows in range(1, count + 1)}:
            self._round(batch, self._width(1), self._most, Kind.GREEDY)
        self._warm_up_calls(most_tokens)

    def _brings_tokens(self, plan: Plan, kind: Kind) -> bool:
        return self._in_rounds(plan, kind)

    @staticmethod
    def _in_rounds(plan: Plan, kind: Kind) -> bool:
        return not plan.pieces and kind < Kind.PENALIZED

    def _start(self, plan: Plan, kind: Kind) -> tuple[Tensor, Ints, Given]:
        if self._in_rounds(plan, kind):
            return self._run_rounds(plan, kind)
        plain = dataclasses.replace(plan, drafted=np.zeros_like(plan.drafted))
        tokens, order, tell = self._mixed(plain, kind)
        return tokens, order, functools.partial(one_each, tell)

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

    def _run_rounds(self, plan: Plan, kind: Kind) -> tuple[Tensor, Ints, Given]:
        rows, limits = plan.decodes, plan.positions + 1 + plan.drafted
        batch, depth = step_rows(int(rows[-1]) + 1, self._rows.count), self.depth
        this = self._round(batch, self._width(int(limits.max())), depth, kind)
        heads = np.zeros((4, batch), np.int64)
        known = (self._ready[0, rows] == self._rows.serial[rows]) & (self._ready[1, rows] == plan.positions)
        heads[0, rows], heads[1, rows] = self._rows.history[rows, plan.positions], plan.positions
        heads[2, rows], heads[3, rows] = limits, np.where(known, self._ready[2, rows], 0)
        this.load(self._buffers.send(heads))
        count = min(self.rounds, 1 + int(plan.drafted.max()))
        outcomes = torch.empty((count, batch, depth + 3), dtype=torch.int64, device=self._model.device)
        for place in range(count):
            this.run()
            outcomes[place].copy_(this.outcome)
        self.captured += this.recorded
        self._buffers.overtaken()
        return outcomes, np.arange(count), functools.partial(self._gathered, plan, depth)

    def _round(self, batch: int, width: int, depth: int, kind: Kind) -> Round:
        key = (batch, width, depth, kind)
        if key not in self._rounds:
            draws = self._buffers.draws(kind)
            state = self._buffers.state.first(batch, width)
            self._rounds[key] = Round(self._model, self._drafter, state, self._drafts, depth, draws)
        return self._rounds[key]

    def _gathered(self, plan: Plan, depth: int, outcomes: Ints) -> Chosen:
        """What rounds gave, from [M, B, depth + 3], row by row."""
        rows, width = plan.decodes, depth + 1
        found = outcomes[:, rows].transpose(1, 0, 2)
        kept = found[:, :, width]
        real = np.arange(width) < kept[:, :, None]
        counts = kept.sum(1)
        tokens = np.full((len(rows), int(counts.max())), NO_TOKEN, np.int64)
        tokens[np.arange(tokens.shape[1]) < counts[:, None]] = found[:, :, :width][real]
        self._ready[:, rows] = self._rows.serial[rows], plan.positions + counts, np.where(kept[:, -1] > 0, depth, 0)
        chosen = Chosen(tokens, counts, rounds=Rounds(found[:, :, width + 1].T, kept.T))
        self._go_on(plan, chosen)
        return chosen
