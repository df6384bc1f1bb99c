"""The tree of guesses that a program with heads drafts, and how it is chosen: Medusa's sparse tree (Cai et al. 2024, section
2.3.3, https://arxiv.org/abs/2401.10774), by how often guesses were right together.

The paper multiplies how often each head's guess of each rank is right, as if heads erred apart from each other. Here whole
paths are counted: a head mostly errs where those before it do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Annotated

import msgspec

MOST_NODES = 62
"""Guesses of a tree: with the token that they follow they are as many as `paged_tree_attention_` takes."""
_Small = Annotated[int, msgspec.Meta(ge=0, le=4096)]


class DraftTree(msgspec.Struct, frozen=True, kw_only=True):
    """Guesses that are verified together, the likeliest ones first, each behind the one that it follows.

    Attributes:
        heads, ranks: the program's `drafted` holds the likeliest `ranks` guesses of each of its heads.
        nodes: the guess that one follows, counted from 1 (0: the last token itself), and its rank. A guess that follows k
            others is one of head k.
        shares: how often each was right, with all that it follows. tokens: greedy ones that this was measured on.
    """

    heads: _Small
    ranks: _Small
    nodes: Annotated[tuple[tuple[_Small, _Small], ...], msgspec.Meta(max_length=MOST_NODES)]
    shares: tuple[float, ...] = ()
    tokens: Annotated[int, msgspec.Meta(ge=0, le=1 << 62)] = 0

    def __post_init__(self) -> None:
        """Refuse what is no tree of these heads' guesses.

        Raises:
            ValueError: it names the guess.
        """
        depths, seen = [0], set()
        for number, (parent, rank) in enumerate(self.nodes, 1):
            if parent >= number or rank >= self.ranks or depths[parent] >= self.heads or (parent, rank) in seen:
                raise ValueError(f"guess {number} of the tree, of rank {rank} behind guess {parent}, cannot be")
            depths.append(depths[parent] + 1)
            seen.add((parent, rank))

    @property
    def paths(self) -> tuple[tuple[int, ...], ...]:
        """The ranks of each guess and of those that it follows, the first one's first."""
        found: list[tuple[int, ...]] = [()]
        for parent, rank in self.nodes:
            found.append((*found[parent], rank))
        return tuple(found[1:])


def choose_tree(right: Sequence[Sequence[int]], *, heads: int, ranks: int, size: int) -> DraftTree:
    """The tree of `size` guesses at most that gives the most tokens of all of that size, over what was seen.

    Args:
        right: of places of a text, the rank of the right token among each head's guesses; -1 where it was not among them.
    """
    counts: Counter[tuple[int, ...]] = Counter()
    for row in right:
        for depth in range(heads):
            if row[depth] < 0:
                break
            counts[tuple(row[: depth + 1])] += 1
    best = sorted(counts, key=lambda path: (-counts[path], path))[:size]
    number = {(): 0} | {path: place for place, path in enumerate(best, 1)}
    return DraftTree(
        heads=heads,
        ranks=ranks,
        nodes=tuple((number[path[:-1]], path[-1]) for path in best),
        shares=tuple(counts[path] / len(right) for path in best),
        tokens=len(right),
    )
