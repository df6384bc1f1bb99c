"""Drafters without weights: what they guess of texts that repeat themselves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from optc.runtime.speculative.drafter import Ask, Drafter
from optc.runtime.speculative.ngram import NgramDrafter
from optc.runtime.speculative.suffix import SuffixDrafter


def guess(drafter: Drafter, tokens: Sequence[int], most: int = 4, name: str = "a") -> list[int]:
    return list(drafter.propose([Ask(name, np.array(tokens), most)])[0])


@pytest.mark.parametrize("kind", [NgramDrafter, SuffixDrafter])
def test_what_followed_before_is_drafted(kind: type[NgramDrafter | SuffixDrafter]) -> None:
    drafter = kind()
    assert guess(drafter, [1, 2, 3, 4, 5, 6, 9, 1, 2, 3]) == [4, 5, 6, 9]
    assert guess(drafter, [1, 2, 3, 4, 5, 6, 9, 1, 2, 3, 4], 2) == [5, 6]
    assert guess(drafter, [1, 2, 3, 4, 5, 6, 9, 1, 2, 3, 4, 7, 8], 2) == []
    assert guess(drafter, [1, 2, 3, 9, 1, 2], name="b") == [3, 9, 1, 2]
    drafter.forget("a")
    assert guess(drafter, [4, 5]) == []


@pytest.mark.parametrize("kind", [NgramDrafter, SuffixDrafter])
def test_a_text_that_goes_in_circles_is_drafted_as_far_as_wanted(kind: type[NgramDrafter | SuffixDrafter]) -> None:
    assert guess(kind(), [8, 9] + [1, 2, 3] * 12, 11) == [1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2]


def test_ngrams_take_the_latest_place_and_the_longest_match() -> None:
    text = [7, 1, 2, 30, 0, 8, 1, 2, 31, 0, 9, 1, 2, 32, 0]
    assert guess(NgramDrafter(), [*text, 5, 1, 2], 1) == [32]
    assert guess(NgramDrafter(), [*text, 8, 1, 2], 1) == [31]


def test_suffixes_take_what_followed_most_often_and_stop_where_it_is_unlikely() -> None:
    often = [1, 2, 3] * 3 + [1, 2, 4]
    assert guess(SuffixDrafter(), [*often, 0, 1, 2], 1) == [3]
    forks = [item for last in range(10, 30) for item in (1, 2, last)]
    assert guess(SuffixDrafter(), [*forks, 0, 1, 2], 4) == []  # each of twenty followed once
