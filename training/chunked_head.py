"""The loss inside the language-model head: no whole logits in training.

The model's own forward pass runs, in whatever wrapper it is; only its head gives the summed loss where it would give
logits. So weights that FSDP gathers, hooks and precision are those of any other forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from optc.compiler.diagnostics import GateError
from optc.training.config import TrainConfig
from optc.training.data import Batch
from optc.training.distill import LossSums, logits_of, loss_sums
from optc.training.dpo import preference_sums
from optc.training.frozen_base import FrozenBase
from optc.training.linear_cross_entropy import Teacher, linear_cross_entropy

_AFTER_THE_HEAD = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Config keys of models that change the logits behind their head (Gemma 2, Cohere, Granite)."""


def chunked_head(model: Any, config: TrainConfig, teacher: Any | None = None) -> nn.Linear | None:
    """The head whose loss can be made in chunks; None where whole logits are needed.

    They are needed by preferences (sums of each answer), by scope `model` of compile (which compiles the head), by
    DeepSpeed, and where the head of the model or of its teacher is no plain linear or something follows it.
    """
    needs_logits = (
        config.loss_chunk == 0
        or config.dpo.enabled
        or config.compile.scope == "model"
        or config.parallel.kind == "deepspeed"
    )
    if needs_logits or (teacher is not None and _plain_head(teacher) is None):
        return None
    return _plain_head(model)


def _plain_head(model: Any) -> nn.Linear | None:
    """The linear that alone makes a model's logits, or None."""
    if isinstance(model, partial):
        model = model.func
    head: nn.Module = model.get_output_embeddings()
    if type(head) is not nn.Linear or getattr(head, "bias", None) is not None:
        return None
    if any(getattr(model.config, key, None) is not None for key in _AFTER_THE_HEAD):
        return None
    return head


def check_head(model: Any, head: nn.Linear, config: TrainConfig) -> None:
    """Compare the loss in the head with that of the logits on a few tokens.

    Raises:
        GateError: they differ: this model does something else with its logits.
    """
    tokens = torch.arange(16, device=head.weight.device).view(2, 8) % head.out_features
    batch = Batch(tokens, torch.zeros_like(tokens), tokens.roll(-1, 1), packed=False, padded=False)
    model.eval()
    with torch.no_grad():
        expected = loss_sums(logits_of(model, batch), batch, config, None).total
        found = _chunked(model, head, batch, config).total
    model.train()
    if not torch.allclose(expected, found, rtol=1e-4, equal_nan=True):
        raise GateError(
            f"the loss made in the head is {float(found):.6g}, that of the logits {float(expected):.6g}",
            where=type(model).__name__,
            why="the model changes its logits after the head",
            remedy="train on whole logits: --set loss_chunk=0",
        )


def loss_of(
    module: Callable[..., Any],
    batch: Batch,
    config: TrainConfig,
    *,
    head: nn.Linear | None,
    teacher: Callable[..., Any] | None,
) -> LossSums:
    """The loss of a batch: that of heads on a frozen base, or of preferences; or made in `head`, the one inside the
    module, or from whole logits where that is None.

    Fewer tokens than the head is wide have smaller logits than the head's gradient, which chunks keep: whole logits.
    """
    if isinstance(module, FrozenBase):
        found: LossSums = module(batch)
        return found
    if config.dpo.enabled:
        return preference_sums(module, batch, config, teacher)
    if head is None or batch.labels.numel() < head.in_features:
        return loss_sums(logits_of(module, batch), batch, config, teacher)
    return _chunked(module, head, batch, config, teacher)


def _chunked(
    module: Callable[..., Any],
    head: nn.Linear,
    batch: Batch,
    config: TrainConfig,
    teacher: Callable[..., Any] | None = None,
) -> LossSums:
    target = None if teacher is None else _read_by_the_head(teacher, batch, config)
    with _loss_in_place_of_logits(head, batch.labels, config, target):
        total, entropy, divergence = logits_of(module, batch).flatten().unbind()
    return LossSums(total, entropy.detach(), None if teacher is None else divergence.detach())


@torch.no_grad()
def _read_by_the_head(teacher: Callable[..., Any], batch: Batch, config: TrainConfig) -> Teacher:
    head = _plain_head(teacher)
    assert head is not None
    with _in_place_of(head, lambda hidden: hidden):
        hidden = logits_of(teacher, batch).flatten(0, 1)
    return Teacher(hidden, head.weight, config.distill.weight, config.distill.temperature)


def _loss_in_place_of_logits(
    head: nn.Linear, labels: Tensor, config: TrainConfig, teacher: Teacher | None
) -> AbstractContextManager[None]:
    def forward(hidden: Tensor) -> Tensor:
        assert hidden.shape[:-1] == labels.shape, "the head sees every position"
        parts = linear_cross_entropy(
            hidden.flatten(0, 1),
            head.weight,
            labels.flatten(),
            chunk=config.loss_chunk,
            compiled=config.compile.scope == "blocks",
            teacher=teacher,
        )
        return torch.stack(parts).view(1, 1, 3)

    return _in_place_of(head, forward)


@contextmanager
def _in_place_of(head: nn.Linear, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Another forward pass of the head."""
    assert "forward" not in vars(head)
    head.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        del head.forward
