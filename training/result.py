"""What a training run has as its result: the summary in its output folder and in `--json`."""

from __future__ import annotations

from typing import Any

import msgspec
from torch import nn

from optc.training.config import TrainConfig
from optc.training.linears import expert_weights
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
        skipped: steps without an update.
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
    notes: tuple[str, ...] = ()


def left_experts(model: nn.Module, config: TrainConfig) -> tuple[str, ...]:
    """What is not done to experts that a model holds stacked: QAT, adapters and NF4 are for `nn.Linear`."""
    found = expert_weights(model)
    if config.qat.enabled:
        left = "experts are trained and written unrounded"
    elif config.lora.enabled:
        left = "experts are frozen, without adapters" + (", and not in NF4" if config.lora.base == "nf4" else "")
    else:
        return ()
    if not found:
        return ()
    return (f"{left}: {sum(found.values()):,} weights in {len(found)} tensors, {next(iter(found))} the first",)
