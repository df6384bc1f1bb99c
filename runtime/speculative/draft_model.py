"""Drafts by a smaller model with the same tokens (Leviathan et al. 2023, https://arxiv.org/abs/2211.17192; Chen et al.
2023, https://arxiv.org/abs/2302.01318), token by token: the likeliest one, or the one that it draws by the uniform number
with which the model that verifies will draw at that place.

The model has a paged KV cache of its own. Drafts of all requests are made together; what was rejected is forgotten at the
next ask, and its slots are written again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from optc.compiler.execution.block_manager import BlockManager, StepInputs
from optc.runtime.sessions.feeding import feed
from optc.runtime.sessions.paged import PagedModel
from optc.runtime.speculative.draft_choice import next_of_drafts
from optc.runtime.speculative.draft_room import fitting
from optc.runtime.speculative.drafter import Ask, Tokens, Verified


class DraftModel:
    """See above.

    Args:
        vocabulary: of the model that verifies; greater ids are not drafted.
    """

    def __init__(self, model: PagedModel, vocabulary: int, on_close: Callable[[], None] = lambda: None) -> None:
        self._model, self._vocabulary, self._on_close = model, vocabulary, on_close
        self._manager = BlockManager(model.num_blocks, model.block_size)
        # Of a request's tokens in the cache, those that are no guesses; who asked last comes last.
        self._known: dict[str, int] = {}

    def propose(self, asks: Sequence[Ask]) -> list[list[int]]:
        """See `Drafter`. Requests that the cache or the context has no room for get nothing."""
        drafts: dict[str, list[int]] = {ask.id: [] for ask in asks}
        short = [ask for ask in asks if len(ask.tokens) + ask.most <= self._model.context_length]
        chosen_asks = fitting(short, self._manager, self._known, self.forget)
        asking = {ask.id: ask for ask in chosen_asks}
        work = {ask.id: self._rest(ask) for ask in chosen_asks}
        for place in range(max((ask.most for ask in chosen_asks), default=0)):
            logits = torch.stack(feed(self._manager, list(work.items()), self._model.chunk, self._compute))
            chosen = next_of_drafts(logits[:, : self._vocabulary], [asking[name] for name in work], place)
            for name, token in zip(work, chosen, strict=True):
                drafts[name].append(token)
            work = {name: drafts[name][-1:] for name in work if len(drafts[name]) < asking[name].most}
        return [drafts[ask.id] for ask in asks]

    def observe(self, verified: Sequence[Verified]) -> None:
        """Nothing: the tokens come with the next ask."""

    def forget(self, identity: str) -> None:
        """See `Drafter`."""
        if self._known.pop(identity, None) is not None:
            self._manager.free(identity)

    def close(self) -> None:
        """See `Drafter`."""
        self._known.clear()
        self._on_close()

    def _rest(self, ask: Ask) -> list[int]:
        """The tokens of a request that the cache does not hold, one at least; what else it holds is forgotten."""
        known = self._known.pop(ask.id, None)
        self._known[ask.id] = len(ask.tokens)
        if known is None:
            held = self._manager.start(ask.id, ask.tokens.tolist())
        else:
            kept = min(_agreeing(self._manager.tokens(ask.id), known, ask.tokens), len(ask.tokens) - 1)
            held = self._manager.rewind(ask.id, kept)
        rest: list[int] = ask.tokens[held:].tolist()
        return rest

    def _compute(self, inputs: StepInputs) -> Tensor:
        return self._model.call(inputs, inputs.cu_seqlens[1:].long() - 1)[0]


def _agreeing(held: Sequence[int], known: int, tokens: Tokens) -> int:
    """How many held tokens are those of the request; the first `known` of them still are."""
    drafted = held[known:]
    now = tokens[known : len(held)].tolist()
    same = next((place for place, (old, new) in enumerate(zip(drafted, now, strict=False)) if old != new), len(now))
    return min(len(held), known) + same
