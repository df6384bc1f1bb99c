"""Drafts by the model's own corrections of wrong guesses: lookahead decoding (Fu et al. 2024,
https://arxiv.org/abs/2402.02057), Jacobi iteration with a pool of n-grams. No weights, and no text that repeats itself.

Tokens are guessed far ahead. What the model decides behind each guess is the next guess for the place after it, so guesses
of several steps that were each decided behind the one before are an n-gram that the model finds likely. They go into a pool,
as those of the text do, and are drafted where the text comes to their first token.

Here guesses and candidates share one chain: a draft is what the pool has, and guesses behind it. The paper feeds them as
branches of their own, which takes a mask over branches; a chain needs nothing of the program, and corrects its guesses
behind a candidate that may be wrong.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from optc.runtime.speculative.drafter import Ask, Verified

SIZE = 4
"""Tokens of an n-gram."""
_PER_TOKEN = 8
"""N-grams that are kept for each first token, the latest."""


class LookaheadDrafter:
    """A pool and a window of guesses for each request."""

    def __init__(self) -> None:
        self._of: dict[str, _Window] = {}

    def propose(self, asks: Sequence[Ask]) -> list[list[int]]:
        """See `Drafter`."""
        return [self._of.setdefault(ask.id, _Window()).draft(ask.tokens.tolist(), ask.most) for ask in asks]

    def observe(self, verified: Sequence[Verified]) -> None:
        """See `Drafter`."""
        for item in verified:
            if item.id in self._of:
                self._of[item.id].correct(len(item.tokens), item.drafted.tolist(), item.decided.tolist())

    def forget(self, identity: str) -> None:
        """See `Drafter`."""
        self._of.pop(identity, None)

    def close(self) -> None:
        """See `Drafter`."""
        self._of.clear()


class _Window:
    """What is guessed of one text, by place."""

    def __init__(self) -> None:
        self._pool: dict[int, list[tuple[int, ...]]] = {}  # by first token, those behind it, the latest last
        self._levels: deque[dict[int, int]] = deque(maxlen=SIZE)  # guesses of the last steps, by place
        self._noted = 0

    def draft(self, tokens: list[int], most: int) -> list[int]:
        """What the pool has behind the last token, then guesses."""
        for end in range(max(self._noted, SIZE - 1), len(tokens)):
            self._keep(tuple(tokens[end - SIZE + 1 : end + 1]))
        self._noted = len(tokens)
        found: list[int] = []
        while len(found) < most and (behind := self._pool.get((found or tokens)[-1])):
            found += behind[-1]
        guesses = self._levels[-1] if self._levels else {}
        for place in range(len(tokens) + len(found), len(tokens) + most):
            found.append(guesses.get(place, tokens[place * 7919 % len(tokens)]))  # any token of the text begins it
        return found[:most]

    def correct(self, place: int, drafted: list[int], decided: list[int]) -> None:
        """Tokens drafted for places from `place` on, and what the model decided there and at the place behind them."""
        fed = dict(enumerate(drafted, place))
        if self._levels:
            fed = {**self._levels[-1], **fed}  # what was not from the level before takes its place
            self._levels[-1] = fed
        else:
            self._levels.append(fed)
        self._levels.append(dict(enumerate(decided, place)))
        for end in range(place + 1, place + len(decided)):
            gram = self._diagonal(end)
            if gram is not None:
                self._keep(gram)

    def _diagonal(self, end: int) -> tuple[int, ...] | None:
        """Guesses of the last steps up to a place, each decided behind the one before it."""
        levels = list(self._levels)[-SIZE:]
        if len(levels) < SIZE:
            return None
        places = range(end - SIZE + 1, end + 1)
        if any(place not in level for place, level in zip(places, levels, strict=True)):
            return None
        return tuple(level[place] for place, level in zip(places, levels, strict=True))

    def _keep(self, gram: tuple[int, ...]) -> None:
        behind = self._pool.setdefault(gram[0], [])
        if gram[1:] in behind:
            behind.remove(gram[1:])
        behind.append(gram[1:])
        del behind[:-_PER_TOKEN]
