"""What a training run has as its result: the summary in its output folder and in `--json`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from optc.training.checkpoint import ValidationState
from optc.training.config import TrainConfig
from optc.training.metrics import StepRecord
from optc.training.sample import TrainSample

SUMMARY = "train.json"


class ValidationResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The losses of the validation set, nats per label token; None where they are not finite.

    Attributes:
        first, first_perplexity: before the first step; no perplexity where the model itself is not trained.
        best, best_step: the least behind a step, and the step.
        last: behind the last step.
        written_step: the step whose weights the output holds.
        stopped_early: whether the run ended for want of a new best.
    """

    first: float | None
    best: float | None
    best_step: int
    last: float | None
    written_step: int
    stopped_early: bool
    first_perplexity: float | None = None


class TrainResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a run wrote, as OUTPUT/train.json and `optc train --json` have it.

    Attributes:
        output: the model folder.
        run: identity of the run, kept over resumes.
        steps: optimizer steps of the run.
        resumed_from: step of the checkpoint that this process started from, or None.
        first_loss, last_loss: nats per label token, of the first step and the last.
        tokens: label tokens that were trained on.
        seconds: sum over the steps.
        parameters, trainable: how many.
        config: the run's config.
        last: the last step.
        skipped: steps without an update.
        validation: what the validation set said; None without one.
        sample: what the model writes before the first step and behind the last; None where it writes no text.
        notes: what was asked for and is not so everywhere: experts that are not rounded.
    """

    output: str
    run: str
    steps: int
    resumed_from: int | None
    first_loss: float | None
    last_loss: float | None
    tokens: int
    seconds: float
    parameters: int
    trainable: int
    config: dict[str, Any]
    last: StepRecord
    skipped: int = 0
    validation: ValidationResult | None = None
    sample: TrainSample | None = None
    notes: tuple[str, ...] = ()


def validation_result(
    state: ValidationState | None, config: TrainConfig, records: Sequence[StepRecord]
) -> ValidationResult | None:
    """The summary of the measurements of a run; None without a validation set.

    Args:
        records: its steps; behind the last one it was measured.
    """
    if state is None:
        return None
    last = records[-1]
    kept = config.validation.keep_best and state.best_step > 0
    return ValidationResult(
        first=state.first,
        first_perplexity=state.first_perplexity,
        best=state.best,
        best_step=state.best_step,
        last=last.validation_loss,
        written_step=state.best_step if kept else last.step,
        stopped_early=last.step < config.max_steps,
    )
