"""What the engine knows of each running request, in arrays with a row for each: a step of all of them is a few operations.

Nothing here is per token: a step of hundreds of rows writes its tokens in one operation, and Python looks at those rows
only that end, grow or join.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from optc.runtime.speculative.shape import Shape

Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

NO_STOP = -2
"""Fills up the stop tokens of a row; it is no token, nor `NO_TOKEN`."""
_FEW_STOPS = 4


class Kind(IntEnum):
    """What choosing the tokens of a row takes, each more than the one before: the largest logit; a draw; the tokens that it
    holds; or changes to the logits, or more to tell than the token."""

    GREEDY = 0
    DRAWN = 1
    PENALIZED = 2
    OPEN = 3


class Rows:
    """The state of `count` rows of up to `capacity` tokens, held in blocks of `block_size`.

    Attributes:
        history: int32 [rows, capacity + 1], the tokens of each row, the first `known` of them; the last one is not fed.
        known: tokens that the host has. fed: those that are in the KV pool, or will be by the steps that were launched.
        drafted: tokens behind the known ones in `history` that are a guess of what follows; the next plan takes or drops them.
        shape: of the drafts of all rows, where they are trees, of which each row has the first tokens.
        end: of `known`, at which the row ends. room: slots of its blocks.
        tables: int32 [rows, most blocks], and `owned` of them.
        decoding: rows whose prompt is fed. single: rows of which no token may be fed before it was read.
        stops: int64 [rows, any], filled up with `NO_STOP`.
        high: rows below it may be taken, none from it on.
        serial: counts the requests that had the row, so that what comes late for the one before is known.
        kind: int8, a `Kind`: what choosing the row's tokens takes.
        names: of the requests that have the rows.
        told: of `known`, those that answers hold, and the prompt's. plain: answers hold tokens and nothing else from now on.
    """

    def __init__(self, count: int, capacity: int, block_size: int) -> None:
        self.count, self.capacity, self.block_size = count, capacity, block_size
        self.history = np.zeros((count, capacity + 1), np.int32)
        self.tables = np.zeros((count, -(-capacity // block_size)), np.int32)
        self.known, self.fed, self.end, self.room, self.owned, self.serial = np.zeros((6, count), np.int64)
        self.drafted, self.told = np.zeros((2, count), np.int64)
        self.shape: Shape | None = None
        self.decoding, self.single, self.plain = np.zeros((3, count), np.bool_)
        self.names = np.full(count, "", np.object_)
        self.kind = np.zeros(count, np.int8)
        self.stops = np.full((count, _FEW_STOPS), NO_STOP, np.int64)
        self._free = list(range(count))[::-1]
        self.high = 0

    @property
    def free(self) -> int:
        """Rows that can be had."""
        return len(self._free)

    def take(
        self,
        name: str,
        tokens: list[int],
        *,
        end: int,
        stops: list[int],
        single: bool,
        kind: Kind,
        told: int,
        plain: bool,
    ) -> int:
        """A row for a request that has these tokens, the lowest that is free."""
        row = self._free.pop()
        self.high = max(self.high, row + 1)
        self.history[row, : len(tokens)] = tokens
        self.known[row], self.fed[row], self.end[row] = len(tokens), 0, end
        self.room[row] = self.owned[row] = self.drafted[row] = 0
        self.decoding[row], self.single[row], self.kind[row] = False, single, kind
        self.names[row], self.told[row], self.plain[row] = name, told, plain
        if len(stops) > self.stops.shape[1]:
            wider = np.full((self.count, len(stops)), NO_STOP, np.int64)
            wider[:, : self.stops.shape[1]] = self.stops
            self.stops = wider
        self.stops[row] = NO_STOP
        self.stops[row, : len(stops)] = stops
        return row

    def give_back(self, row: int) -> None:
        """The row may be another request's."""
        self.serial[row] += 1
        self.decoding[row] = False
        self._free.append(row)
        self._free.sort(reverse=True)
        if row == self.high - 1:
            taken = set(range(self.high)).difference(self._free)
            self.high = max(taken, default=-1) + 1

    def move(self, row: int) -> int:
        """What a row holds moves to the lowest one that is free."""
        new = self._free.pop()
        known, owned = int(self.known[row]), int(self.owned[row])
        self.history[new, :known] = self.history[row, :known]
        self.tables[new, :owned] = self.tables[row, :owned]
        for values in (
            *(self.known, self.fed, self.end, self.room, self.owned, self.decoding, self.single, self.kind),
            *(self.stops, self.names, self.told, self.plain),
        ):
            values[new] = values[row]
        self.high = max(self.high, new + 1)
        self.give_back(row)
        return new

    def draft(self, row: int, tokens: Sequence[int]) -> None:
        """Guess the tokens that follow the known ones; see `drafted`."""
        known = int(self.known[row])
        assert known + len(tokens) < self.end[row], "the last token of a row is not fed"
        self.history[row, known : known + len(tokens)] = tokens
        self.drafted[row] = len(tokens)

    def tell(self, rows: Ints) -> tuple[npt.NDArray[np.int32], Ints]:
        """The tokens of rows that are known and not told, end to end, and how many of each: they are told from then on."""
        told = self.told[rows]
        counts = self.known[rows] - told
        owner = np.repeat(np.arange(len(rows)), counts)
        place = np.arange(len(owner)) - (counts.cumsum() - counts - told)[owner]
        self.told[rows] += counts
        return self.history[rows[owner], place], counts

    def tokens(self, row: int) -> list[int]:
        """All tokens of a row that are known."""
        found: list[int] = self.history[row, : self.known[row]].tolist()
        return found
