"""What a step gave to all requests, in arrays: hundreds get one token each, and no object is made for any of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self, overload

import numpy as np
import numpy.typing as npt

from optc.runtime.serving.request import Answer
from optc.runtime.serving.rows import Ints


@dataclass(frozen=True, slots=True, eq=False)
class Answers(Sequence[Answer]):
    """As a sequence, an `Answer` for each request, made when it is asked for.

    Attributes:
        ids: of the R requests that got tokens, go on, and have nothing else to tell.
        tokens: int32 [T], theirs, end to end. counts: int64 [R].
        others: of the other requests, whose answers are their first or their last, or hold more than tokens.
    """

    ids: list[str]
    tokens: npt.NDArray[np.int32]
    counts: Ints
    others: list[Answer]

    @classmethod
    def of(cls, others: list[Answer]) -> Self:
        """Of an engine that makes each answer by itself."""
        return cls([], np.zeros(0, np.int32), np.zeros(0, np.int64), others)

    def __len__(self) -> int:
        return len(self.ids) + len(self.others)

    @overload
    def __getitem__(self, place: int) -> Answer: ...
    @overload
    def __getitem__(self, place: slice) -> list[Answer]: ...
    def __getitem__(self, place: int | slice) -> Answer | list[Answer]:
        return list(self)[place]

    def __iter__(self) -> Iterator[Answer]:
        end = 0
        for name, count in zip(self.ids, self.counts.tolist(), strict=True):
            end += count
            yield Answer(id=name, tokens=self.tokens[end - count : end].tolist())
        yield from self.others

    def only(self, places: Sequence[int], others: list[Answer]) -> Answers:
        """Those at some places of `ids`, ascending, with `others` instead of its own."""
        if len(places) == len(self.ids):
            return Answers(self.ids, self.tokens, self.counts, others)
        wanted = np.zeros(len(self.ids), np.bool_)
        wanted[places] = True
        ids = [self.ids[place] for place in places]
        return Answers(ids, self.tokens[np.repeat(wanted, self.counts)], self.counts[wanted], others)
