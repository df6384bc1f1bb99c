"""The loss of a batch: cross-entropy with the text, and the KL divergence from a teacher's distributions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from optc.compiler.capture.facts import text_config
from optc.compiler.diagnostics import InputError, UsageError
from optc.training.config import TrainConfig
from optc.training.data import IGNORED, Batch
from optc.training.models import load_frozen
from optc.training.parallel import sum_over_ranks


@dataclass(frozen=True)
class LossSums:
    """Sums over the label tokens of a batch, in nats; divide by the tokens of the whole step.

    Attributes:
        total: what is minimized (with a graph).
        cross_entropy, divergence: its parts, detached; no teacher, no divergence.
        rewards: [3], of pairs of answers: the rewards of the chosen and of the rejected ones, and how many of the former
            are the higher ones.
    """

    total: Tensor
    cross_entropy: Tensor | None
    divergence: Tensor | None
    rewards: Tensor | None = None


class Losses(NamedTuple):
    """Means over what a loss is a mean over, of all ranks; None of what a recipe does not have."""

    loss: float
    cross_entropy: float | None
    divergence: float | None
    chosen_reward: float | None
    rejected_reward: float | None
    reward_accuracy: float | None


def mean_losses(parts: Sequence[LossSums], terms: int, device: torch.device) -> Losses:
    """Means of some micro-batches of all ranks, summed in float64; a GPU is waited for here alone.

    Args:
        terms: what the loss is a mean over, of all ranks.
    """

    def mean(items: Sequence[Tensor | None]) -> float | None:
        kept = [float(item) for item in items if item is not None]
        return sum_over_ranks(math.fsum(kept), device) / terms if kept else None

    loss = mean([part.total for part in parts])
    assert loss is not None
    rewards = [(None,) * 3 if part.rewards is None else part.rewards.unbind() for part in parts]
    columns = ([part.cross_entropy for part in parts], [part.divergence for part in parts], *zip(*rewards, strict=True))
    return Losses(loss, *(mean(column) for column in columns))


def load_teacher(config: TrainConfig, vocab_size: int) -> Any | None:
    """The teacher, frozen, or None.

    Raises:
        InputError: an unusable folder, or another vocabulary.
        UsageError: a model from scratch as its own teacher.
    """
    name = teacher_name(config)
    if name is None:
        return None
    if name == "self" and config.from_scratch:
        raise UsageError("a model from scratch cannot be its own teacher", remedy="give distill.teacher a model folder")
    folder = Path(config.model if name == "self" else name)
    teacher = load_frozen(folder)
    found = text_config(teacher.config).vocab_size
    if found != vocab_size:
        raise InputError(
            f"the teacher has {found} tokens in its vocabulary, the model {vocab_size}",
            where=str(folder),
            remedy="give a teacher with the model's tokenizer",
        )
    return teacher


def teacher_name(config: TrainConfig) -> str | None:
    """The second model of a run, a folder or "self": distill.teacher, or what preferences are learned against.

    With adapters that is the model without them, and no second one.
    """
    if config.dpo.enabled:
        return None if config.lora.enabled else "self"
    return config.distill.teacher


def logits_of(model: Callable[..., Any], batch: Batch) -> Tensor:
    """Logits [B, S, V] of a batch.

    Without packed rows the model counts positions itself: told them, a compiled model would build masks that cut
    nothing, and leave the attention kernels that are causal by nature.
    """
    positions = batch.position_ids if batch.packed else None
    logits: Tensor = model(input_ids=batch.input_ids, position_ids=positions, use_cache=False).logits
    return logits


def loss_sums(logits: Tensor, batch: Batch, config: TrainConfig, teacher: Callable[..., Any] | None) -> LossSums:
    """The loss of a batch from its logits [B, S, V], in fp32."""
    student, labels = logits.float().flatten(0, 1), batch.labels.flatten()
    if teacher is None:
        entropy = functional.cross_entropy(student, labels, ignore_index=IGNORED, reduction="sum")
        return LossSums(entropy, entropy.detach(), None)
    with torch.no_grad():
        target = logits_of(teacher, batch).float().flatten(0, 1)
    if batch.padded:
        kept = labels != IGNORED
        student, target, labels = student[kept], target[kept], labels[kept]
    temperature, weight = config.distill.temperature, config.distill.weight
    log_q = (student / temperature if temperature != 1 else student).log_softmax(-1)
    log_p = (target / temperature).log_softmax(-1)
    divergence = functional.kl_div(log_q, log_p, log_target=True, reduction="sum")
    # At temperature 1 both terms read the same log-probabilities.
    plain = log_q if temperature == 1 else student.log_softmax(-1)
    entropy = -plain.gather(1, labels[:, None]).sum()
    total = (1 - weight) * entropy + weight * temperature**2 * divergence
    return LossSums(total, entropy.detach(), divergence.detach())
