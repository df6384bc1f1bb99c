"""Runs planned steps of a paged program. An interface first: the engine does not know on how many devices, or how."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from optc.runtime.serving.plan import Plan
from optc.runtime.serving.rows import Ints, Rows
from optc.runtime.serving.sampler import RequestSampler, choose
from optc.runtime.sessions.paged import PagedModel
from optc.runtime.sessions.session import Logits

SamplerOf = Callable[[int], RequestSampler | None]
"""The sampler of a row; None where it takes the largest logit."""


class ModelRunner(Protocol):
    """Runs steps one after another; of each, `collect` gives the tokens, in the order in which they were launched.

    Attributes:
        ahead: how many steps may be launched before the first of them is collected, beyond one.
        model_s: seconds since the start in which the host waited for the model.
    """

    ahead: int
    model_s: float

    def warm_up(self, most_tokens: int) -> None:
        """Do what steps of up to so many tokens do once, before requests come."""

    def launch(self, plan: Plan) -> None: ...

    def collect(self) -> Ints:
        """int64, a token for each of `plan.rows`; `NO_TOKEN` where its logits are not finite."""


class HostRunner:
    """Runs a step as one call, mixed of decodes and prompts, and chooses on the host.

    Args:
        rows: read when a step is launched, before it advances them: `Plan` says at which positions.
        sampler_of: see `SamplerOf`.
    """

    ahead = 0

    def __init__(self, model: PagedModel, rows: Rows, sampler_of: SamplerOf) -> None:
        self._model, self._rows, self._sampler_of = model, rows, sampler_of
        self._chosen: list[Ints] = []
        self.model_s = 0.0

    def warm_up(self, most_tokens: int) -> None:
        """Nothing: all steps are alike."""

    def launch(self, plan: Plan) -> None:
        """See `ModelRunner`."""
        logits = self._compute(plan)
        plain = not self._rows.kind[plan.rows].any()
        samplers = [] if plain else [self._sampler_of(row) for row in plan.rows.tolist()]
        self._chosen.append(choose(logits, samplers))

    def collect(self) -> Ints:
        """See `ModelRunner`."""
        return self._chosen.pop(0)

    @torch.inference_mode()
    def _compute(self, plan: Plan) -> Logits:
        """Logits of the last token of each of `plan.rows`."""
        model = self._model
        inputs, wanted = step_inputs(plan, self._rows)
        given = (*inputs, wanted) if model.selects else inputs
        tensors = [torch.from_numpy(item).to(model.device) for item in given]
        begin = time.perf_counter()
        outputs = model.run(*tensors, *model.pools)
        self.model_s += time.perf_counter() - begin
        logits: Tensor = outputs[0] if isinstance(outputs, tuple | list) else outputs
        if not model.selects and len(wanted) < len(logits):
            logits = logits[torch.from_numpy(wanted)]
        found: Logits = logits.float().cpu().numpy()
        return found


def step_inputs(plan: Plan, rows: Rows) -> tuple[list[np.ndarray], Ints]:
    """The tables of one call for a whole step, in the order of `StepInputs`, and which tokens' logits are wanted."""
    size, decodes, positions, pieces = rows.block_size, plan.decodes, plan.positions, plan.pieces
    starts = np.concatenate([positions, np.array([piece.start for piece in pieces], np.int64)])
    counts = np.concatenate([np.ones(len(decodes), np.int64), np.array([piece.size for piece in pieces], np.int64)])
    places = np.concatenate([decodes, np.array([piece.row for piece in pieces], np.int64)])
    ids = [rows.history[decodes, positions].astype(np.int64)]
    at = [positions]
    for piece in pieces:
        ids.append(rows.history[piece.row, piece.start : piece.start + piece.size].astype(np.int64))
        at.append(np.arange(piece.start, piece.start + piece.size))
    position = np.concatenate(at)
    lengths = starts + counts
    tables = rows.tables[places, : -(-int(lengths.max()) // size)]
    owner = np.repeat(np.arange(len(places)), counts)
    slots = tables[owner, position // size].astype(np.int64) * size + position % size
    bounds = np.concatenate([np.zeros(1, np.int64), counts.cumsum()])
    wanted = bounds[1:] - 1
    last = np.concatenate([np.ones(len(decodes), np.bool_), np.array([piece.last for piece in pieces], np.bool_)])
    inputs = [np.concatenate(ids), position, slots, tables, lengths.astype(np.int32), bounds.astype(np.int32)]
    return inputs, wanted[last]
