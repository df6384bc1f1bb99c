"""What rows draw by, in fixed tensors on a device: a captured step that reads them serves any parameters."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from optc.runtime.sessions.streaming import Draw

_MOST = 2**31 - 1
_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")


class RowDraws:
    """Parameters of `optc::sample_` for `batch` rows, all of which are greedy at first.

    Args:
        vocabulary: V, where rows may have penalties, for tables of their tokens (5 bytes each); None where none has.
    """

    def __init__(self, batch: int, device: torch.device, vocabulary: int | None = None) -> None:
        self._temperature = torch.zeros(batch, device=device)
        self._top_k = torch.zeros(batch, dtype=torch.int32, device=device)
        self._top_p = torch.ones(batch, device=device)
        self._min_p = torch.zeros(batch, device=device)
        self._seed = torch.zeros(batch, dtype=torch.int64, device=device)
        self._vocabulary = vocabulary
        self._penalties: list[Tensor] | None = None
        if vocabulary is not None:
            self._penalties = [torch.zeros(batch, device=device) for _ in _PENALTIES]
            self._seen = torch.zeros((batch, vocabulary), dtype=torch.bool, device=device)
            self._counts = torch.zeros((batch, vocabulary), dtype=torch.int32, device=device)
        self.load([], [])

    @torch.inference_mode()
    def load(self, draws: Sequence[Draw], rows: Sequence[Sequence[int]]) -> None:
        """Set the parameters of the first rows; the others become greedy.

        Args:
            rows: for each draw the tokens of its row, which penalties look at.
        """
        padded = [*draws, *[Draw()] * (len(self._seed) - len(draws))]
        chosen = [draw.sampling for draw in padded]
        self._temperature.copy_(torch.tensor([sampling.heat for sampling in chosen]))
        self._top_k.copy_(torch.tensor([min(sampling.top_k, _MOST) for sampling in chosen], dtype=torch.int32))
        self._top_p.copy_(torch.tensor([sampling.top_p for sampling in chosen]))
        self._min_p.copy_(torch.tensor([sampling.min_p for sampling in chosen]))
        self._seed.copy_(torch.tensor([draw.seed for draw in padded], dtype=torch.int64))
        if self._penalties is not None:
            for name, tensor in zip(_PENALTIES, self._penalties, strict=True):
                tensor.copy_(torch.tensor([getattr(sampling, name) for sampling in chosen]))
            self._tell(draws, rows)

    def first(self, batch: int) -> RowDraws:
        """The first rows, in the same memory."""
        part = copy.copy(self)
        for name in self._tensors():
            setattr(part, name, getattr(self, name)[:batch])
        if self._penalties is not None:
            part._penalties = [tensor[:batch] for tensor in self._penalties]
        return part

    def of(self, rows: Tensor) -> RowDraws:
        """Copies for some rows, in their order; `give_back` returns what choosing changed in them."""
        part = copy.copy(self)
        for name in self._tensors():
            setattr(part, name, getattr(self, name).index_select(0, rows))
        if self._penalties is not None:
            part._penalties = [tensor.index_select(0, rows) for tensor in self._penalties]
        return part

    def give_back(self, part: RowDraws, rows: Tensor) -> None:
        """See `of`."""
        if self._penalties is not None:
            self._seen.index_copy_(0, rows, part._seen)
            self._counts.index_copy_(0, rows, part._counts)

    @property
    def tables(self) -> list[Tensor]:
        """What choosing writes."""
        return [] if self._penalties is None else [self._seen, self._counts]

    def _tensors(self) -> list[str]:
        tables = [] if self._penalties is None else ["_seen", "_counts"]
        return ["_temperature", "_top_k", "_top_p", "_min_p", "_seed", *tables]

    @torch.inference_mode()
    def set(self, rows: Tensor, draws: Sequence[Draw], tokens: Sequence[Sequence[int]]) -> None:
        """Set the parameters of some rows.

        Args:
            rows: int64, as many as there are draws. tokens: of each, what its row holds.
        """
        part = RowDraws(len(draws), self._seed.device, self._vocabulary)
        part.load(draws, tokens)
        self._put(part, rows)

    @torch.inference_mode()
    def move(self, old: Tensor, new: Tensor) -> None:
        """Rows get what others have; int64, as many of both."""
        self._put(self.of(old), new)

    def _put(self, part: RowDraws, rows: Tensor) -> None:
        for name in self._tensors():
            getattr(self, name).index_copy_(0, rows, getattr(part, name))
        for own, new in zip(self._penalties or [], part._penalties or [], strict=True):
            own.index_copy_(0, rows, new)

    def _tell(self, draws: Sequence[Draw], rows: Sequence[Sequence[int]]) -> None:
        """What rows with penalties hold."""
        self._seen.zero_()
        self._counts.zero_()
        device = self._seen.device
        for place, (draw, row) in enumerate(zip(draws, rows, strict=True)):
            if draw.sampling.penalizes:
                tokens = torch.tensor(row, dtype=torch.int64, device=device)
                self._seen[place].index_fill_(0, tokens, True)
                generated = tokens[draw.prompt_length :]
                self._counts[place].index_add_(0, generated, torch.ones_like(generated, dtype=torch.int32))

    def choose(self, logits: Tensor, positions: Tensor) -> Tensor:
        """int64 [B]: a token for each row of logits [B, V]; `NO_TOKEN` where the largest logit is not finite.

        Rows hold what was chosen from then on.

        Args:
            positions: int64 [B], of the tokens that the logits come from.
        """
        cuts = (self._top_k, self._top_p, self._min_p)
        penalties = (None,) * 5 if self._penalties is None else (*self._penalties, self._seen, self._counts)
        tokens, _ = torch.ops.optc.sample_(logits, self._temperature, *cuts, *penalties, self._seed, positions)
        chosen: Tensor = tokens
        return chosen
