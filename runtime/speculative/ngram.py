"""Drafts what followed the last tokens when they stood there before (prompt lookup, Saxena 2023,
https://github.com/apoorvumang/prompt-lookup-decoding): no weights, and next to no time."""

from __future__ import annotations

from collections.abc import Sequence

from optc.runtime.speculative.drafter import Ask, Verified

LONGEST, SHORTEST = 4, 2
"""Tokens that must have stood there before; the longest that did decide."""


class NgramDrafter:
    """Looks in the request's own prompt and answer, at the latest place."""

    def __init__(self) -> None:
        self._of: dict[str, _Places] = {}

    def propose(self, asks: Sequence[Ask]) -> list[list[int]]:
        """See `Drafter`."""
        return [self._of.setdefault(ask.id, _Places()).continuation(ask.tokens.tolist(), ask.most) for ask in asks]

    def observe(self, verified: Sequence[Verified]) -> None:
        """Nothing: the tokens come with the next ask."""

    def forget(self, identity: str) -> None:
        """See `Drafter`."""
        self._of.pop(identity, None)

    def close(self) -> None:
        """See `Drafter`."""
        self._of.clear()


class _Places:
    """Where each n-gram of a text was followed by something, the latest of these places."""

    def __init__(self) -> None:
        self._behind: dict[tuple[int, ...], int] = {}
        self._noted = 0

    def continuation(self, tokens: list[int], most: int) -> list[int]:
        """What followed the longest n-gram that the text ends with."""
        for end in range(self._noted + 1, len(tokens)):  # the last token is followed by nothing yet
            for size in range(SHORTEST, min(LONGEST, end) + 1):
                self._behind[tuple(tokens[end - size : end])] = end
        self._noted = max(self._noted, len(tokens) - 1)
        for size in range(min(LONGEST, len(tokens)), SHORTEST - 1, -1):
            place = self._behind.get(tuple(tokens[-size:]))
            if place is not None:
                return _repeated(tokens, place, most)
        return []


def _repeated(tokens: list[int], place: int, most: int) -> list[int]:
    """Tokens from a place on; where the text ends, it goes on as it did from there."""
    period = len(tokens) - place
    return [tokens[place + index % period] for index in range(most)]
