"""Shapes of drafts: a chain, or a tree of guesses of which several follow the same token.

A tree's guesses are fed in their order, each in the slot behind the one before; `parents` says which token each follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np

from optc.compiler.execution.paged_call import Ints
from optc.compiler.ir.draft_tree import DraftTree
from optc.runtime.speculative.settings import Speculation

Path = tuple[int, ...]
"""Ranks of a guess and of those that it follows, the first one's first."""


@dataclass(frozen=True, eq=False)
class Shape:
    """A draft of n tokens behind a request's last one, which is token 0.

    Attributes:
        nodes: [n], the number of each guess among all that may be drafted (`Ladder`).
        ranks: [n], of each guess among those of its head.
        parents: int64 [n + 1], the token that each one follows; -1 for token 0.
        depths: int64 [n + 1], how many each one follows.
        bits: int64 [n + 1], which tokens each one sees, see `paged_tree_attention_`.
    """

    nodes: Sequence[int]
    ranks: Sequence[int]
    parents: Ints
    depths: Ints
    bits: Ints

    @classmethod
    def of(cls, paths: Sequence[Path], nodes: Sequence[int]) -> Self:
        """Of some guesses, none in front of one that it follows, all of which are among them."""
        number: dict[Path, int] = {(): 0}
        parents, bits = [-1], [1]
        for place, node in enumerate(nodes, 1):
            parent = number[paths[node][:-1]]
            number[paths[node]] = place
            parents.append(parent)
            bits.append(bits[parent] | 1 << place)
        depths = np.array([0, *(len(paths[node]) for node in nodes)], np.int64)
        ranks = [paths[node][-1] for node in nodes]
        return cls(nodes, ranks, np.array(parents, np.int64), depths, np.array(bits, np.int64))

    def __len__(self) -> int:
        """Guesses."""
        return len(self.nodes)

    @property
    def is_chain(self) -> bool:
        """Whether no two guesses follow the same token."""
        return int(self.depths.max()) == len(self)

    def tokens(self, guesses: Sequence[Sequence[int]]) -> list[int]:
        """The draft, from the guesses of each head, the likeliest first."""
        return [guesses[depth - 1][rank] for depth, rank in zip(self.depths[1:].tolist(), self.ranks, strict=True)]


class Ladder(NamedTuple):
    """The drafts that an engine chooses among, by numbers from 1 on; the last one has every guess.

    Attributes:
        rungs: guesses of each. shapes: None where drafts are chains of what a drafter likes.
    """

    rungs: Sequence[Sequence[int]]
    shapes: Sequence[Shape] | None = None

    @classmethod
    def chain(cls, most: int) -> Self:
        """Chains of up to so many tokens."""
        return cls([range(size) for size in range(1, most + 1)])

    @classmethod
    def halves(cls, most: int) -> Self:
        """Chains of so many tokens and of half as many, where each other length would be captured anew."""
        return cls([range(size) for size in sorted({-(-most // 2), most})])

    @classmethod
    def tree(cls, tree: DraftTree, deepest: int, *, chains: bool) -> Self:
        """The likeliest guesses of a tree, as many as may be; and the chain of the likeliest guess of each head, where it
        is none of these.

        Args:
            deepest: guesses that follow each other. chains: offer them, too.
        """
        paths = [path for path in tree.paths if len(path) <= deepest]
        rungs = [tuple(range(size)) for size in range(1, len(paths) + 1)]
        if chains:
            chain: list[Path] = [(0,) * size for size in range(1, deepest + 1)]
            paths += [path for path in chain if path not in paths]
            places = [paths.index(path) for path in chain]
            rungs += [tuple(places[:size]) for size in range(1, deepest + 1)]
            rungs.append(tuple(range(len(paths))))
            rungs = list({frozenset(rung): rung for rung in rungs[::-1]}.values())[::-1]
        return cls(rungs, [Shape.of(paths, rung) for rung in rungs])


def ladder_of(options: Speculation, tree: DraftTree | None) -> Ladder:
    """The drafts that an engine may make.

    Args:
        options: with as many draft tokens as are made. tree: of the program's heads; None where it has none.
    """
    if tree is None or options.method != "medusa" or options.shape == "chain":
        return Ladder.chain(options.draft_tokens)
    chains = options.shape == "auto" and options.adaptive
    return Ladder.tree(tree, options.draft_tokens, chains=chains)
