"""The tree that gives the most tokens, of what was seen; and trees that cannot be."""

from __future__ import annotations

import itertools

import msgspec
import numpy as np
import pytest

from optc.compiler.ir.draft_tree import DraftTree, choose_tree


def test_whole_paths_are_counted() -> None:
    """Two heads, two ranks: by each head apart (0, 0) would be as good as (1, 1); together it is never right."""
    right = [[0, 1]] * 4 + [[1, 1]] * 3 + [[1, -1]] * 2 + [[-1, 0]] * 3
    tree = choose_tree(right, heads=2, ranks=2, size=3)
    assert tree.paths == ((1,), (0,), (0, 1))
    assert tree.nodes == ((0, 1), (0, 0), (2, 1))
    assert tree.shares == (5 / 12, 4 / 12, 4 / 12)
    assert (tree.tokens, tree.heads, tree.ranks) == (12, 2, 2)


def test_no_tree_of_its_size_gives_more() -> None:
    """Against all trees of three guesses, of random ranks."""
    rng = np.random.default_rng(0)
    right = (rng.geometric(0.5, (60, 3)) - 1).tolist()
    right = [[rank if rank < 2 else -1 for rank in row] for row in right]
    paths = [path for size in (1, 2, 3) for path in itertools.product(range(2), repeat=size)]

    def gain(chosen: tuple[tuple[int, ...], ...]) -> int:
        return sum(tuple(row[: len(path)]) == path for row in right for path in chosen)

    whole = [
        chosen
        for chosen in itertools.combinations(paths, 3)
        if all(len(path) == 1 or path[:-1] in chosen for path in chosen)
    ]
    tree = choose_tree(right, heads=3, ranks=2, size=3)
    assert gain(tree.paths) == max(map(gain, whole))
    assert sum(tree.shares) == pytest.approx(gain(tree.paths) / 60)


@pytest.mark.parametrize(
    ("nodes", "number"),
    [
        (((1, 0),), 1),
        (((0, 0), (0, 0)), 2),
        (((0, 2),), 1),
        (((0, 0), (1, 0), (2, 0)), 3),
    ],
    ids=["behind itself", "twice", "rank", "depth"],
)
def test_what_is_no_tree_is_refused(nodes: tuple[tuple[int, int], ...], number: int) -> None:
    with pytest.raises(ValueError, match=f"guess {number} of the tree"):
        DraftTree(heads=2, ranks=2, nodes=nodes)
    with pytest.raises(msgspec.ValidationError, match=f"guess {number} of the tree"):
        msgspec.convert({"heads": 2, "ranks": 2, "nodes": nodes}, DraftTree)
