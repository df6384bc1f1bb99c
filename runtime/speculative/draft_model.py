"""Drafts by a smaller model with the same tokens (Leviathan et al. 2023, https://arxiv.org/abs/2211.17192; Chen et al.
2023, https://arxiv.org/abs/2302.01318), token by token: the likeliest one, or the one that it draws by the uniform number
with which the model that verifies will draw at that place.

The model has a paged KV cache of its own. Drafts of all requests are made together; what was rejected is forgotten at the
next ask, and its slots are written again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from optc.compiler.execution.block_manager import BlockManager
from optc.runtime.sessions.paged import PagedModel
from optc.runtime.speculative.draft_choice import next_of_drafts
from optc.runtime.speculative.draft_room import fitting
from optc.runtime.speculative.drafter import Ask, Tokens, Verified


@dataclass(slots=True)
class _Request:
    """Attributes:
    held: tokens whose keys and values are in the cache.
    known: of them, those that were the request's own; the others were drafted.
    """

    held: list[int] = field(default_factory=list)
    known: int = 0


class DraftModel:
    """See above.

    Args:
        vocabulary: of the model that verifies; greater ids are not drafted.
    """

    def __init__(self, model: PagedModel, vocabulary: int, on_close: Callable[[], None] = lambda: None) -> None:
        self._model, self._vocabulary, self._on_close = model, vocabulary, on_close
        self._manager = BlockManager(model.num_blocks, model.block_size)
        self._requests: dict[str, _Request] = {}  # those that asked last come last

    def propose(self, asks: Sequence[Ask]) -> list[list[int]]:
        """See `Drafter`. Requests that the cache or the context has no room for get nothing."""
        drafts: dict[str, list[int]] = {ask.id: [] for ask in asks}
        short = [ask for ask in asks if len(ask.tokens) + ask.most <= self._model.context_length]
        chosen_asks = fitting(short, self._manager, self._requests, self.forget)
        asking = {ask.id: ask for ask in chosen_asks}
        work = {ask.id: self._rest(ask) for ask in chosen_asks}
        for place in range(max((ask.most for ask in chosen_asks), default=0)):
            logits = self._feed(work)
            chosen = next_of_drafts(logits[:, : self._vocabulary], [asking[name] for name in work], place)
            for name, token in zip(work, chosen, strict=True):
                drafts[name].append(token)
            work = {name: drafts[name][-1:] for name in work if len(drafts[name]) < asking[name].most}
        return [drafts[ask.id] for ask in asks]

    def observe(self, verified: Sequence[Verified]) -> None:
        """Nothing: the tokens come with the next ask."""

    def forget(self, identity: str) -> None:
        """See `Drafter`."""
        if self._requests.pop(identity, None) is not None:
            self._manager.free(identity)

    def close(self) -> None:
        """See `Drafter`."""
        self._requests.clear()
        self._on_close()

    def _rest(self, ask: Ask) -> list[int]:
        """The tokens of a request that the cache does not hold, one at least; what else it holds is forgotten."""
        known = len(ask.tokens)
        request = self._requests.pop(ask.id, None)
        if request is None:
            request = _Request()
            tokens: list[int] = ask.tokens.tolist()
            request.held = tokens[: self._manager.start(ask.id, tokens)]
        else:
            kept = min(_agreeing(request, ask.tokens), known - 1)
            del request.held[self._manager.rewind(ask.id, kept) :]
        request.known = known
        self._requests[ask.id] = request
        rest: list[int] = ask.tokens[len(request.held) :].tolist()
        return rest

    def _feed(self, work: dict[str, list[int]]) -> Tensor:
        """Logits [R, V] behind these tokens of each request."""
        found: dict[str, Tensor] = {}
        group: list[tuple[str, list[int]]] = []
        room = self._model.chunk
        for name, tokens in work.items():
            rest = tokens
            while len(rest) > room:
                group += [(name, rest[:room])] if room else []
                rest, room = rest[room:], self._model.chunk
                found |= self._call(group)
                group = []
            group.append((name, rest))
            room -= len(rest)
        found |= self._call(group)
        return torch.stack([found[name] for name in work])

    @torch.inference_mode()
    def _call(self, work: list[tuple[str, list[int]]]) -> dict[str, Tensor]:
        model = self._model
        inputs = self._manager.step(work)
        logits, _ = model.call(inputs, inputs.cu_seqlens[1:].long() - 1)
        for name, tokens in work:
            self._manager.commit(name)
            self._requests[name].held += tokens
        return {name: row for (name, _), row in zip(work, logits, strict=True)}


def _agreeing(request: _Request, tokens: Tokens) -> int:
    """How many held tokens are those of the request; all that were its own still are."""
    drafted = request.held[request.known :]
    now = tokens[request.known : len(request.held)].tolist()
    same = next((place for place, (old, new) in enumerate(zip(drafted, now, strict=False)) if old != new), len(now))
    return min(len(request.held), request.known) + same
