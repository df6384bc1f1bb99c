"""Trees of new tokens, for tests: by the token that each one follows, -1 for the first."""

from __future__ import annotations

from collections.abc import Sequence


def path_to(parents: Sequence[int], token: int) -> list[int]:
    """The tokens that one follows, the first one first, and itself."""
    path = [token]
    while parents[path[0]] >= 0:
        path.insert(0, parents[path[0]])
    return path


def bits_of(parents: Sequence[int]) -> list[int]:
    """What each token sees, as `paged_tree_attention_` takes it."""
    return [sum(1 << seen for seen in path_to(parents, token)) for token in range(len(parents))]
