"""Drafts by a model of one layer that reads hidden states of the model that verifies (EAGLE-3, Li et al. 2025,
https://arxiv.org/abs/2503.01840), token by token; its own state takes the place of the base's behind the last one known.

At position i the draft model is fed the token behind it and the base's states at i, so its cache ends a token earlier than
the base's. It has pools of its own. What it computed from its own states is forgotten at the next ask, when the base's
states of the tokens that were kept are fed instead.

A base that found a prompt's beginning in its pool computes no states there. The draft model then takes what its own pool
has of the same tokens, or else begins where the states do; keys are turned by distances alone, so that it may. It begins
anew, too, where nothing was drafted for long: what it would have to catch up with costs more than a long memory gives.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from optc.compiler.execution.block_manager import BlockManager
from optc.runtime.sessions.paged import PagedModel
from optc.runtime.speculative.device_drafter import ROLE
from optc.runtime.speculative.draft_choice import next_of_drafts
from optc.runtime.speculative.draft_room import fitting
from optc.runtime.speculative.drafter import Ask, Fed, Verified

_PIECES = 32
"""Steps whose states are kept one by one."""
_MOST_WAITING = 256
"""States of a request that wait at most while nothing is drafted."""


@dataclass(slots=True)
class _Request:
    """Positions of a request: `begin` to `begin + held` are in the cache, by the base's states; those behind wait.

    Attributes:
        waiting: rows of the base's states [n, C], not fed yet. count: so many.
        last: that of the position that was fed last.
        placed: the block manager knows the request.
    """

    begin: int
    held: int = 0
    waiting: list[Tensor] = field(default_factory=list)
    count: int = 0
    last: Tensor | None = None
    placed: bool = False

    @property
    def end(self) -> int:
        """The first position without a state."""
        return self.begin + self.held + self.count

    def wait(self, rows: Tensor, count: int) -> None:
        """Take so many rows [count, C]."""
        self.waiting.append(rows)
        self.count += count

    def take(self) -> Tensor:
        """All rows that wait, which wait no more."""
        rows = self.waiting[0] if len(self.waiting) == 1 else torch.cat(self.waiting)
        self.waiting, self.count = [], 0
        return rows


class _Piece(NamedTuple):
    """Tokens [n] to feed to a request, as the manager keeps them and as the model reads them, and their states."""

    id: str
    keys: list[int]
    ids: list[int]
    base: Tensor
    own: Tensor

    def cut(self, size: int) -> tuple[_Piece, _Piece]:
        first, rest = (part for part in (slice(None, size), slice(size, None)))
        return tuple(  # type: ignore[return-value]
            _Piece(self.id, self.keys[part], self.ids[part], self.base[part], self.own[part]) for part in (first, rest)
        )


class Eagle3Drafter:
    """See above.

    Args:
        model: the draft model, whose logits are over the base's vocabulary; it gives its states behind them.
        widths: of its inputs `base_states` and `own_states`. dtype: theirs.
    """

    def __init__(
        self,
        model: PagedModel,
        widths: tuple[int, int],
        dtype: torch.dtype,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        assert not model.selects, "states of all tokens are wanted"
        self._model, self._widths, self._dtype, self._on_close = model, widths, dtype, on_close
        self._manager = BlockManager(model.num_blocks, model.block_size)
        self._requests: dict[str, _Request] = {}  # those that asked last come last

    def read(self, fed: Sequence[Fed]) -> None:
        """See `ReadingDrafter`. What was read before is not read again; behind a gap, all begins anew."""
        for item in fed:
            rows = item.outputs[ROLE][: item.kept].to(self._model.device, self._dtype)
            request = self._requests.get(item.id)
            if request is None or item.start > request.end:
                self.forget(item.id)
                request = self._requests[item.id] = _Request(item.start)
            missing = item.start + item.kept - request.end
            if missing > 0:
                request.wait(rows[item.kept - missing :], missing)
                if len(request.waiting) > _PIECES:  # while nothing is drafted
                    self._shorten(item.id, request)

    def _shorten(self, identity: str, request: _Request) -> None:
        """Keep the states that wait as one, and of many the last ones alone; the request begins anew there."""
        end, rows = request.end, request.take()
        kept = rows[-_MOST_WAITING:]
        if len(kept) < len(rows):
            if request.placed:
                self._manager.free(identity)
            request = self._requests[identity] = _Request(end - len(kept))
        request.wait(kept, len(kept))

    def propose(self, asks: Sequence[Ask]) -> list[list[int]]:
        """See `Drafter`. Requests without states, or that the cache or the context has no room for, get nothing."""
        drafts: dict[str, list[int]] = {ask.id: [] for ask in asks}
        ready = [ask for ask in asks if self._is_ready(ask)]
        placed = [name for name, request in self._requests.items() if request.placed]
        asking = {ask.id: ask for ask in fitting(ready, self._manager, placed, self._give_way)}
        work = [self._rest(ask) for ask in asking.values()]
        for place in range(max((ask.most for ask in asking.values()), default=0)):
            logits, states = self._feed(work, known=place == 0)
            names = [piece.id for piece in work]
            chosen = next_of_drafts(logits, [asking[name] for name in names], place)
            for name, token in zip(names, chosen, strict=True):
                drafts[name].append(token)
            work = [
                self._own(name, token, states[row : row + 1])
                for row, (name, token) in enumerate(zip(names, chosen, strict=True))
                if len(drafts[name]) < asking[name].most
            ]
            if not work:
                break
        return [drafts[ask.id] for ask in asks]

    def observe(self, verified: Sequence[Verified]) -> None:
        """Nothing: the states tell what was kept."""

    def forget(self, identity: str) -> None:
        """See `Drafter`."""
        request = self._requests.pop(identity, None)
        if request is not None and request.placed:
            self._manager.free(identity)

    def close(self) -> None:
        """See `Drafter`."""
        self._requests.clear()
        self._on_close()

    def _is_ready(self, ask: Ask) -> bool:
        """Whether there are states of all tokens but the last, which is not fed yet."""
        request = self._requests.get(ask.id)
        fits = len(ask.tokens) + ask.most <= self._model.context_length
        return fits and request is not None and request.end == len(ask.tokens) - 1

    def _give_way(self, identity: str) -> None:
        """The cache holds nothing of a request any more: it begins anew where its next states are."""
        request = self._requests[identity]
        self._manager.free(identity)
        end = request.end
        rows = request.last if request.last is not None and not request.waiting else request.take()
        self._requests[identity] = _Request(end - len(rows))
        self._requests[identity].wait(rows, len(rows))

    def _rest(self, ask: Ask) -> _Piece:
        """The positions of a request that the cache does not hold, one at least; what else it holds is forgotten."""
        request = self._requests.pop(ask.id)
        self._requests[ask.id] = request
        if not request.placed:
            self._place(request, ask)
        elif request.waiting:
            self._rewind(request, ask)
        else:  # asked again for the same tokens
            assert request.last is not None
            request.held -= 1
            request.wait(request.last, 1)
            self._rewind(request, ask)
        rows = request.take()
        first = request.begin + request.held
        keys = self._keys(ask, first)
        request.last = rows[-1:]
        request.held += len(rows)
        return _Piece(ask.id, keys, ask.tokens[first + 1 :].tolist(), rows, self._nothing(len(rows), 1))

    def _place(self, request: _Request, ask: Ask) -> None:
        """Begin in the cache, behind what it holds of the same tokens where that reaches the states."""
        request.placed = True
        found = self._manager.start(ask.id, self._keys(ask, 0))
        if found < request.begin:
            self._manager.free(ask.id)
            self._manager.start(ask.id)
            return
        rows = request.take()[found - request.begin :]
        request.begin, request.held = 0, found
        request.wait(rows, len(rows))

    def _rewind(self, request: _Request, ask: Ask) -> None:
        """Forget what was drafted. Of a block that others read too the rest is left behind, and the request begins anew."""
        if self._manager.rewind(ask.id, request.held) < request.held:
            self._manager.free(ask.id)
            self._manager.start(ask.id)
            request.begin, request.held = request.begin + request.held, 0

    def _keys(self, ask: Ask, first: int) -> list[int]:
        """What tells positions from each other: their token and the one behind it, which both make keys and values."""
        tokens = ask.tokens[first:].tolist()
        return [token * (1 << 31) + behind for token, behind in itertools.pairwise(tokens)]

    def _own(self, name: str, token: int, state: Tensor) -> _Piece:
        return _Piece(name, [token], [token], self._nothing(1, 0), state.to(self._dtype))

    def _nothing(self, rows: int, which: int) -> Tensor:
        return torch.zeros((rows, self._widths[which]), dtype=self._dtype, device=self._model.device)

    def _feed(self, work: Sequence[_Piece], *, known: bool) -> tuple[Tensor, Tensor]:
        """Logits [R, V] and states [R, H] at the last token of each piece."""
        room = self._model.chunk
        if sum(len(piece.ids) for piece in work) <= room:
            return self._call(work, known=known)
        found: dict[str, tuple[Tensor, Tensor]] = {}
        group: list[_Piece] = []
        for piece in work:
            rest = piece
            while len(rest.ids) > room:
                first, rest = rest.cut(room)
                found |= self._ends([*group, first] if room else group, known=known)
                group, room = [], self._model.chunk
            group.append(rest)
            room -= len(rest.ids)
        found |= self._ends(group, known=known)
        logits, states = zip(*(found[piece.id] for piece in work), strict=True)
        return torch.stack(logits), torch.stack(states)

    def _ends(self, work: Sequence[_Piece], *, known: bool) -> dict[str, tuple[Tensor, Tensor]]:
        """What `_call` gives, by request."""
        ends = zip(*self._call(work, known=known), strict=True)
        return {piece.id: end for piece, end in zip(work, ends, strict=True)}

    @torch.inference_mode()
    def _call(self, work: Sequence[_Piece], *, known: bool) -> tuple[Tensor, Tensor]:
        """Logits [R, V] and states [R, H] at the last token of each piece, of one call.

        Only what was made of the base's states may be found by other requests, and only from the beginning on.
        """
        model = self._model
        inputs = self._manager.step([(piece.id, piece.keys) for piece in work])
        inputs = inputs._replace(input_ids=torch.tensor([token for piece in work for token in piece.ids]))
        states = [torch.cat([piece.base for piece in work]), torch.cat([piece.own for piece in work])]
        logits, own = model.run(*(item.to(model.device) for item in inputs), *states, *model.pools)
        for piece in work:
            if known and not self._requests[piece.id].begin:
                self._manager.commit(piece.id)
        if len(logits) == len(work):
            return logits, own
        last = (inputs.cu_seqlens[1:].long() - 1).to(logits.device)
        return logits[last], own[last]
