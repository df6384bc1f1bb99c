"""Drafts by heads that the model itself has: Medusa (Cai et al. 2024, https://arxiv.org/abs/2401.10774).

Behind each position the model gives, beside the logits of the next token, the likeliest tokens of the places after that
(the pass `add-medusa-heads`). Those of the last position that was kept are the next draft: it takes no time, and no cache.

The draft is the chain of the likeliest ones, or a tree of the heads' best tokens, as in the paper: see `shape`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from optc.runtime.speculative.drafter import Ask, Fed, Verified


class MedusaDrafter:
    """Keeps what the heads guessed last for each request, `ranks` tokens of each head."""

    def __init__(self, ranks: int = 1) -> None:
        self._ranks = ranks
        self._of: dict[str, tuple[int, list[int]]] = {}  # the place of the first guessed token, and the tokens

    def propose(self, asks: Sequence[Ask]) -> list[list[int]]:
        """See `Drafter`."""
        found = []
        for ask in asks:
            tokens = self._behind(ask.id, len(ask.tokens))
            if ask.shape is not None and tokens:
                heads = [tokens[begin : begin + self._ranks] for begin in range(0, len(tokens), self._ranks)]
                found.append(ask.shape.tokens(heads)[: ask.most])
            else:
                found.append(tokens[:: self._ranks][: ask.most])
        return found

    def _behind(self, identity: str, place: int) -> list[int]:
        first, tokens = self._of.get(identity, (0, []))
        return tokens if first == place else []

    def observe(self, verified: Sequence[Verified]) -> None:
        """Nothing: guesses come with `read`."""

    def read(self, fed: Sequence[Fed]) -> None:
        """See `ReadingDrafter`."""
        fed = [item for item in fed if "drafted" in item.outputs]
        if not fed:
            return
        rows = torch.stack([item.outputs["drafted"][item.kept - 1] for item in fed]).tolist()
        for item, tokens in zip(fed, rows, strict=True):
            self._of[item.id] = (item.start + item.kept + 1, tokens)  # behind the token that the model decided

    def forget(self, identity: str) -> None:
        """See `Drafter`."""
        self._of.pop(identity, None)

    def close(self) -> None:
        """See `Drafter`."""
        self._of.clear()
