"""Direct preference optimization (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290).

A pair's loss is -log sigmoid(beta * margin), the margin being by how much more the model than its reference prefers the
chosen answer to the rejected one, in nats of the whole answers. The reference is the model as it was: a frozen copy, or
where adapters are trained the same model without them. Label smoothing: Mitchell 2023,
https://ericmitchell.ai/cdpo.pdf.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from optc.training.config import TrainConfig
from optc.training.conflicts import refuse_beside
from optc.training.data import IGNORED, Batch
from optc.training.distill import LossSums, logits_of
from optc.training.lora import adapters_off
from optc.training.pairs import PairBatch


def preference_sums(
    module: Callable[..., Any], batch: Batch, config: TrainConfig, reference: Callable[..., Any] | None
) -> LossSums:
    """The loss of a batch of pairs, summed over them, and the rewards of their answers.

    Args:
        module: what is trained.
        reference: the model as it was; None of a module with adapters, which are left out for it.
    """
    assert isinstance(batch, PairBatch)
    found = answer_log_probabilities(module, batch)
    with torch.no_grad():
        if reference is not None:
            before = answer_log_probabilities(reference, batch)
        else:
            whole = module.func if isinstance(module, partial) else module
            assert isinstance(whole, torch.nn.Module)
            with adapters_off(whole):
                before = answer_log_probabilities(module, batch)
    beta, smoothing = config.dpo.beta, config.dpo.label_smoothing
    chosen, rejected = (beta * (found - before)).view(-1, 2).unbind(1)
    margin = chosen - rejected
    loss = -(1 - smoothing) * functional.logsigmoid(margin) - smoothing * functional.logsigmoid(-margin)
    counted = batch.counted.float()
    rewards = torch.stack([(item.detach() * counted).sum() for item in (chosen, rejected, (margin > 0).float())])
    return LossSums((loss * counted).sum(), None, None, rewards)


def answer_log_probabilities(model: Callable[..., Any], batch: Batch) -> Tensor:
    """float32 [B]: log-probability of all labels of each row together, in nats."""
    logits = logits_of(model, batch).float()
    losses = functional.cross_entropy(
        logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return -losses.view_as(batch.labels).sum(1)


def check_dpo(config: TrainConfig) -> None:
    """Refuse what does not go with preferences, before a weight is read.

    Raises:
        UsageError: names the other key.
    """
    if not config.dpo.enabled:
        return
    others = (
        (config.from_scratch, "from_scratch", "the model as it was is the reference"),
        (config.distill.teacher is not None, "distill.teacher", "the model as it was is the reference"),
        (config.eagle3.enabled, "eagle3.enabled", "a draft model has no preferences"),
        (config.medusa.enabled, "medusa.enabled", "draft heads have no preferences"),
        (config.data.batching != "pack", "data.batching", "a batch is made of pairs"),
        (config.optimizer.name == "sophia", "optimizer.name=sophia", "its Hessian is estimated of the text's loss"),
        (config.parallel.kind == "deepspeed", "parallel.kind=deepspeed", "two forward passes make one loss"),
    )
    refuse_beside("dpo.enabled", others)
