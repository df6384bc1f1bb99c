"""Drafts the likeliest continuation of the longest suffix that stood there before, as SuffixDecoding does (Oliaro et al.
2024, https://arxiv.org/abs/2411.04975): how often tokens followed each other decides how far the draft goes.

The tree is of one request's prompt and answer. Nothing is shared between requests, so that none can learn from the time
of its answers what others were told.
"""

from __future__ import annotations

from collections.abc import Sequence

from optc.runtime.speculative.drafter import Ask, Verified

DEPTH = 12
"""Tokens of the longest suffix that is kept."""
_LEAST_CHANCE = 0.1
"""A draft ends where the chance of all of it, by the counts, is less."""
_PER_MATCHED = 2
"""Drafted tokens for each one that matched: what stood there for longer is likelier to go on."""


class SuffixDrafter:
    """A suffix tree of bounded depth for each request."""

    def __init__(self) -> None:
        self._of: dict[str, _Tree] = {}

    def propose(self, asks: Sequence[Ask]) -> list[list[int]]:
        """See `Drafter`."""
        return [self._of.setdefault(ask.id, _Tree()).continuation(ask.tokens.tolist(), ask.most) for ask in asks]

    def observe(self, verified: Sequence[Verified]) -> None:
        """Nothing: the tokens come with the next ask."""

    def forget(self, identity: str) -> None:
        """See `Drafter`."""
        self._of.pop(identity, None)

    def close(self) -> None:
        """See `Drafter`."""
        self._of.clear()


class _Node:
    """A string that occurred `count` times in the text; `next` are those with one token more."""

    __slots__ = ("count", "next")

    def __init__(self) -> None:
        self.count = 0
        self.next: dict[int, _Node] | None = None  # most nodes never have any

    def grown(self, token: int) -> _Node:
        """The string with one token more, which occurred once more."""
        if self.next is None:
            self.next = {}
        child = self.next.get(token)
        if child is None:
            child = self.next[token] = _Node()
        child.count += 1
        return child

    def likeliest(self) -> tuple[int, float]:
        """The token that followed most often, the smallest among equals, and its share; of a node with `next`."""
        assert self.next
        token, child = min(self.next.items(), key=lambda item: (-item[1].count, item[0]))
        return token, child.count / sum(other.count for other in self.next.values())


class _Tree:
    """All strings of a text of up to `DEPTH` tokens, with their counts."""

    def __init__(self) -> None:
        self._root = _Node()
        self._noted = 0
        self._open: list[_Node] = []  # of the suffixes of what was noted, the longest first

    def continuation(self, tokens: list[int], most: int) -> list[int]:
        """The likeliest tokens behind a text that the tree's grows to."""
        for token in tokens[self._noted :]:
            self._open = [node.grown(token) for node in [*self._open[-(DEPTH - 1) :], self._root]]
        self._noted = len(tokens)
        found: list[int] = []
        chance, text = 1.0, tokens[-DEPTH:]
        while len(found) < most and (matched := self._longest(text)) is not None:
            node, length = matched
            most = min(most, _PER_MATCHED * length) if not found else most
            token, share = node.likeliest()
            chance *= share
            if chance < _LEAST_CHANCE:
                break
            found.append(token)
            text = [*text, token][-DEPTH:]
        return found

    def _longest(self, text: list[int]) -> tuple[_Node, int] | None:
        """The longest suffix of a text that something followed, and its tokens."""
        for start in range(len(text)):
            node = self._find(text[start:])
            if node is not None and node.next is not None:
                return node, len(text) - start
        return None

    def _find(self, text: list[int]) -> _Node | None:
        node: _Node | None = self._root
        for token in text:
            node = None if node is None or node.next is None else node.next.get(token)
        return node
