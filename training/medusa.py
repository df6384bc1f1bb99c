"""Training of Medusa heads on a frozen base: Medusa-1 (Cai et al. 2024, https://arxiv.org/abs/2401.10774).

Head k reads what the model's own head reads at a position, and says what the token k + 2 places behind is, where the model
says what the next one is: x + SiLU(W x + b), then a linear over the vocabulary, which may be the model's own. The loss of
head k weighs decay^k.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from optc.compiler.analysis.module_linears import output_head
from optc.compiler.diagnostics import UsageError
from optc.compiler.model_folder.checkpoint import check_folder
from optc.compiler.model_folder.draft_origin import Origin
from optc.compiler.model_folder.medusa import MedusaConfig, MedusaFolder, MedusaHead
from optc.training.config import TrainConfig
from optc.training.data import Batch
from optc.training.distill import LossSums, logits_of
from optc.training.frozen_base import FrozenBase, behind, shares, within


class ResidualBlock(nn.Module):
    """x + SiLU(W x + b), of zeros at first."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + functional.silu(self.linear(x))


class MedusaTraining(FrozenBase):
    """A frozen base and the heads that learn from it; at first each says what the base's own head says.

    Raises:
        UsageError: a base whose head is no plain linear.
    """

    def __init__(self, base: Any, config: TrainConfig) -> None:
        super().__init__(base)
        self._settings, self._folder = config.medusa, config.model
        head = output_head(base)
        if not isinstance(head, nn.Linear):
            raise UsageError("the base's head is no linear", where=type(base).__name__, remedy="choose another base")
        rows, size = head.weight.shape
        self.heads = nn.ModuleList()
        for _ in range(config.medusa.heads):
            parts: list[nn.Module] = [ResidualBlock(size) for _ in range(config.medusa.layers)]
            if config.medusa.own_linear:
                own = nn.Linear(size, rows, bias=False)
                own.weight.data.copy_(head.weight.float())
                parts.append(own)
            self.heads.append(nn.Sequential(*parts))

    def forward(self, batch: Batch) -> LossSums:
        """Cross-entropy with the base's distribution, or with the text, at the place that each head is for.

        `LossSums.cross_entropy` is that of the first head.
        """
        with torch.no_grad(), head_input(self.base) as found:
            logits = logits_of(self.base, batch)
        hidden, weights = found[0], shares(self._settings.decay, self._settings.heads)
        losses = []
        for place, (head, weight) in enumerate(zip(self.heads, weights, strict=True), start=1):
            counted = within(batch, place)
            if self._settings.targets == "text":
                target = behind(batch.labels, place)[counted]
            else:
                target = behind(logits, place)[counted].float().softmax(-1)
            # One head's logits are alive at a time; they are made again in the backward.
            loss = checkpoint(self._loss, head, hidden[counted], target, use_reentrant=False)
            losses.append(weight * loss)
        return LossSums(torch.stack(losses).sum(), losses[0].detach() / weights[0], None)

    def _loss(self, head: nn.Module, hidden: Tensor, target: Tensor) -> Tensor:
        logits: Tensor = head(hidden)
        if not self._settings.own_linear:
            logits = self.base.get_output_embeddings()(logits)
        return functional.cross_entropy(logits.float(), target, reduction="sum")

    def write(self, source: Path, directory: Path) -> None:
        """See `FrozenBase`: the folder of `compiler/model_folder/medusa`, in the type of the base's weights."""
        info = check_folder(source)
        dtype = info.dtype if info.dtype in (torch.bfloat16, torch.float16) else torch.float32
        settings = self._settings
        config = MedusaConfig(
            medusa_num_heads=settings.heads,
            medusa_num_layers=settings.layers,
            base_model_name_or_path=self._folder,
        )
        heads = tuple(_stored(head, settings.layers, dtype) for head in self.heads)
        MedusaFolder(config, heads, Origin.of(info)).write(directory)


def _stored(head: Any, layers: int, dtype: torch.dtype) -> MedusaHead:
    blocks = tuple((part.linear.weight.to(dtype), part.linear.bias.to(dtype)) for part in head[:layers])
    return MedusaHead(blocks, head[layers].weight.to(dtype) if len(head) > layers else None)


@contextmanager
def head_input(model: Any) -> Iterator[list[Tensor]]:
    """Keeps what the model's head reads, [B, S, H], of each forward."""
    found: list[Tensor] = []
    head = output_head(model)
    assert head is not None
    hook = head.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    try:
        yield found
    finally:
        hook.remove()
