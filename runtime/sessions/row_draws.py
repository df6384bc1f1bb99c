"""What rows draw by, in fixed tensors on a device: a captured step that reads them serves any parameters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from optc.runtime.sessions.streaming import Draw

_COLDEST, _HOTTEST = 1e-30, 1e30
"""Temperatures that float32 logits can be divided by without becoming infinite or nothing."""
_MOST = 2**31 - 1


class RowDraws:
    """Parameters of `optc::sample_` for `batch` rows, all of which are greedy at first."""

    def __init__(self, batch: int, device: torch.device) -> None:
        self._temperature = torch.zeros(batch, device=device)
        self._top_k = torch.zeros(batch, dtype=torch.int32, device=device)
        self._top_p = torch.ones(batch, device=device)
        self._min_p = torch.zeros(batch, device=device)
        self._seed = torch.zeros(batch, dtype=torch.int64, device=device)

    @torch.inference_mode()
    def load(self, draws: Sequence[Draw]) -> None:
        """Set the parameters of the first rows; the others become greedy."""
        padded = [*draws, *[Draw()] * (len(self._seed) - len(draws))]
        heats = [min(max(draw.temperature, _COLDEST), _HOTTEST) if draw.temperature else 0.0 for draw in padded]
        self._temperature.copy_(torch.tensor(heats))
        self._top_k.copy_(torch.tensor([min(draw.top_k, _MOST) for draw in padded], dtype=torch.int32))
        self._top_p.copy_(torch.tensor([draw.top_p for draw in padded]))
        self._min_p.copy_(torch.tensor([draw.min_p for draw in padded]))
        self._seed.copy_(torch.tensor([draw.seed for draw in padded], dtype=torch.int64))

    def choose(self, logits: Tensor, positions: Tensor) -> Tensor:
        """int64 [B]: a token for each row of logits [B, V]; `NO_TOKEN` where the largest logit is not finite.

        Args:
            positions: int64 [B], of the tokens that the logits come from.
        """
        cuts, no_penalties = (self._top_k, self._top_p, self._min_p), (None,) * 5
        tokens, _ = torch.ops.optc.sample_(logits, self._temperature, *cuts, *no_penalties, self._seed, positions)
        chosen: Tensor = tokens
        return chosen
