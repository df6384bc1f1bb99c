"""Heads that are trained on the hidden states of a model that is not: one forward of the frozen base for each batch."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from optc.compiler.diagnostics import UsageError
from optc.training.blocks import transformer_blocks
from optc.training.config import TrainConfig
from optc.training.conflicts import refuse_beside
from optc.training.data import IGNORED, Batch
from optc.training.distill import LossSums, logits_of


class FrozenBase(nn.Module):
    """A base without gradients, in eval mode, and heads in other submodules, which are what is trained.

    Attributes:
        base: a transformers model. config: its own.
    """

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base: Any = base.requires_grad_(False).eval()
        self.config = base.config

    def train(self, mode: bool = True) -> Self:
        """The base stays as it is."""
        super().train(mode)
        self.base.eval()
        return self

    @abstractmethod
    def forward(self, batch: Batch) -> LossSums:
        """The loss of a batch, which the gradients of the heads follow."""

    @abstractmethod
    def write(self, source: Path, directory: Path) -> None:
        """Write the heads' folder into a directory that is there.

        Args:
            source: the base's folder.
        """

    def run_base(self, batch: Batch, boundaries: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """The base's logits [B, S, V], and its hidden states [B, S, H] at some boundaries; see `hidden_states`."""
        with torch.no_grad(), hidden_states(self.base, boundaries) as found:
            logits = logits_of(self.base, batch)
        return logits, [found[number] for number in boundaries]


@contextmanager
def hidden_states(model: Any, boundaries: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Keeps the residual stream [B, S, H] of each forward at some boundaries of its blocks.

    Args:
        boundaries: j is what enters block j, 0 the embedding; the number of blocks is what leaves the last of them, before
            the final norm.

    Raises:
        UsageError: the model has no such boundary.
    """
    blocks = transformer_blocks(model)
    check_boundaries(boundaries, len(blocks))
    found: dict[int, Tensor] = {}

    def enters(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found[0] = args[0] if args else kwargs["hidden_states"]

    def leaves(number: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            found[number] = output[0] if isinstance(output, tuple) else output

        return hook

    hooks = [
        blocks[number - 1].register_forward_hook(leaves(number))
        if number
        else blocks[0].register_forward_pre_hook(enters, with_kwargs=True)
        for number in set(boundaries)
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def check_boundaries(boundaries: Sequence[int], last: int) -> None:
    """Refuse boundaries beyond the last one that a base has.

    Raises:
        UsageError: see above.
    """
    beyond = [number for number in boundaries if not 0 <= number <= last]
    if beyond:
        raise UsageError(
            f"the base has no hidden state {beyond[0]} that can be read",
            why="0 is the embedding, and j what leaves layer j",
            remedy=f"name numbers from 0 to {last}",
        )


def behind(values: Tensor, count: int) -> Tensor:
    """Of each position what stands so many behind it; of the last ones something else. Labels are never ignored ones."""
    rolled = values.roll(-count, 1)
    return rolled.clamp(min=0) if values.dtype == torch.int64 else rolled


def within(batch: Batch, count: int) -> Tensor:
    """bool [B, S]: the position so many behind is one of the same document, with a label."""
    positions, labels = batch.position_ids, batch.labels
    inside = torch.arange(positions.shape[1], device=positions.device) + count < positions.shape[1]
    return inside & (positions.roll(-count, 1) == positions + count) & (labels.roll(-count, 1) != IGNORED)


def shares(decay: float, count: int) -> list[float]:
    """Of the loss, for each token that is guessed in a row: each `decay` times the one before, and 1 in all."""
    weights = [decay**place for place in range(count)]
    return [weight / sum(weights) for weight in weights]


def check_frozen_base(config: TrainConfig, key: str) -> None:
    """Refuse what has no meaning for heads on a frozen base, before a weight is read.

    Args:
        key: of the config, that asks for heads.

    Raises:
        UsageError: names the other key.
    """
    others = (
        (config.from_scratch, "from_scratch", "heads are trained on a base that is trained"),
        (config.lora.enabled, "lora.enabled", "the base is frozen"),
        (config.qat.enabled, "qat.enabled", "the base is frozen"),
        (config.distill.teacher is not None, "distill.teacher", "the base itself is the teacher"),
        (config.checkpointing.policy != "none", "checkpointing.policy", "the base keeps no activations"),
        (config.compile.scope != "none", "compile.scope", "the base is read at several depths"),
        (config.parallel.kind != "none", "parallel.kind", "heads are trained in one process"),
        (config.optimizer.name == "sophia", "optimizer.name=sophia", "its Hessian is estimated of a model's logits"),
    )
    refuse_beside(key, others)
