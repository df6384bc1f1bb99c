"""What a training run has as its result: the summary in its output folder and in `--json`."""

from __future__ import annotations

from typing import Any

import msgspec

from optc.training.metrics import StepRecord

SUMMARY = "train.json"


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
