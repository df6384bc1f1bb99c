"""The loss of a validation set, measured as the training goes, and what follows of it: the best step, and an early end."""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import msgspec
import torch

from optc.training.chunked_head import loss_of
from optc.training.distill import Losses, mean_losses
from optc.training.frozen_base import FrozenBase
from optc.training.metrics import StepRecord
from optc.training.parallel import sum_over_ranks
from optc.training.precision import autocast
from optc.training.setup import Run

FIRST_SAID = 8.0
"""Seconds of the measurement before the first step, from which on a note says what measuring takes."""


class Measured(NamedTuple):
    """A measurement over all ranks.

    Attributes:
        losses: not finite where they are.
        tokens: label tokens of the set. seconds: wall time.
    """

    losses: Losses
    tokens: int
    seconds: float

    @property
    def perplexity(self) -> float | None:
        """exp of the cross-entropy with the text; None where that is not finite, beyond float64, or not computed."""
        entropy = self.losses.cross_entropy
        return math.exp(entropy) if entropy is not None and entropy < 700 else None


def measure(run: Run) -> Measured:
    """The loss of the validation set with the weights as they are; every rank calls it.

    Nothing of the run changes by it: dropout is off, and random numbers are seeded anew in each step.
    """
    begun = time.perf_counter()
    run.module.eval()
    found = []
    with torch.no_grad():
        for batch in run.held_out:
            batch = batch.to(run.device)
            with autocast(run.config, run.device):
                found.append(loss_of(run.module, batch, run.config, head=run.head, teacher=run.teacher))
    run.module.train()
    tokens, terms = (
        int(sum_over_ranks(count, run.device))
        for count in (sum(batch.label_tokens for batch in run.held_out), sum(batch.terms for batch in run.held_out))
    )
    return Measured(mean_losses(found, terms, run.device), tokens, time.perf_counter() - begun)


def measure_start(run: Run) -> str | None:
    """Measure before the first step; returns a note where that takes long."""
    assert run.validation is not None
    found = measure(run)
    first, perplexity = _finite(found.losses.loss), _perplexity(run, found)
    run.validation = msgspec.structs.replace(run.validation, first=first, first_perplexity=perplexity)
    if found.seconds < FIRST_SAID:
        return None
    return (
        f"one measurement of the validation set, of {found.tokens} tokens, took {found.seconds:.0f} s; "
        f"there is one every {run.config.validation.every} steps (validation.every)"
    )


def measured_step(run: Run, record: StepRecord) -> StepRecord:
    """Measure behind a step: its record with the result, which is kept if it is the best so far."""
    state = run.validation
    assert state is not None
    found = measure(run)
    loss, accuracy = _finite(found.losses.loss), found.losses.reward_accuracy
    if loss is not None and (state.best is None or loss < state.best):
        run.validation = msgspec.structs.replace(state, best=loss, best_step=run.step, waited=0)
    else:
        run.validation = msgspec.structs.replace(state, waited=state.waited + 1)
    perplexity = _perplexity(run, found)
    return msgspec.structs.replace(
        record, validation_loss=loss, validation_perplexity=perplexity, validation_accuracy=accuracy
    )


def _perplexity(run: Run, found: Measured) -> float | None:
    """None of heads and drafts, whose base is not what is trained."""
    return None if isinstance(run.model, FrozenBase) else found.perplexity


def is_due(run: Run) -> bool:
    """Whether the step that was made is one behind which the validation set is measured."""
    wanted = run.validation is not None
    return wanted and (run.step % run.config.validation.every == 0 or run.step == run.config.max_steps)


def stops_early(run: Run) -> bool:
    """Whether the best is so many measurements ago that the run ends."""
    patience = run.config.validation.patience
    return run.validation is not None and 0 < patience <= run.validation.waited


def is_best(run: Run) -> bool:
    """Whether the step that was made is the best so far, and its weights are to be kept."""
    state = run.validation
    return state is not None and run.config.validation.keep_best and state.best_step == run.step > 0


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
