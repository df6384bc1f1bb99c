"""What a model that drafts chooses next."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from optc.runtime.speculative.acceptance import Cuts, decide
from optc.runtime.speculative.drafter import Ask


def next_of_drafts(logits: Tensor, asks: Sequence[Ask], place: int) -> list[int]:
    """The next token of each ask, the one at this place of its draft, from logits [R, V]: the likeliest, or the one that it
    draws by the number with which the model that verifies will draw there."""
    scores = logits.float()
    if all(ask.sampling.greedy for ask in asks):
        return _tokens(torch.ops.optc.argmax(scores))
    uniforms = [0.0 if ask.sampling.greedy else float(ask.uniforms[place]) for ask in asks]
    numbers = torch.tensor(uniforms, dtype=torch.float64, device=scores.device)
    return _tokens(decide(scores, Cuts.of([ask.sampling for ask in asks], scores.device), numbers))


def _tokens(found: Tensor) -> list[int]:
    """As a list; any token where logits are not finite."""
    return found.clamp(min=0).tolist()
