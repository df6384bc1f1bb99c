"""Which draft is to be made, by what steps gave and took so far: none where plain decoding is faster.

The drafts that there are stand on a ladder: chains of one token, two, and so on; or trees of guesses, see `shape`.

Time is measured, not modelled: medians of the last steps of each length of draft (the drafter included) and of plain ones,
for each power of two of rows. Where a length was hardly tried yet, a step is taken to cost as much more as it has more
drafted tokens. Drafts are switched off only when none of those that may be made is expected to pay.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

_KEPT = 32
"""Steps of each kind that are looked at."""
_LEAST = 8
"""Steps of each kind before anything is decided."""
_TIMED = 4
"""Steps of a length of draft whose own time is believed."""
_REFRESH = 32
"""While drafts are on, one step in so many is plain, so that its time stays known."""
_EXPLORE = 8
"""And one in so many is as deep as it may be, so that the acceptance of all places stays known."""
_PAUSE, _LONGEST_PAUSE = 64, 4096
"""Plain steps before drafts are tried again; twice as many each time that they do not pay."""


class Outcome(NamedTuple):
    """A row of a step: its drafted tokens, and how many of them were accepted.

    Attributes:
        guesses: of a tree, the numbers of those that were accepted.
    """

    drafted: int
    accepted: int
    guesses: Sequence[int] | None = None


class _Step(NamedTuple):
    """A step with drafts of all its rows: which draft was asked for, so many rows, their tokens, and how many of them had
    each guess accepted (of a chain: a token at each place)."""

    seconds: float
    rung: int
    rows: int
    tokens: int
    kept: npt.NDArray[np.int64]

    @classmethod
    def of(cls, outcomes: Sequence[Outcome], seconds: float, rung: int, guesses: int) -> _Step:
        numbers = [range(row.accepted) if row.guesses is None else row.guesses for row in outcomes]
        kept = np.bincount(np.concatenate(numbers).astype(np.int64), minlength=guesses)
        tokens = len(outcomes) + sum(row.accepted for row in outcomes)
        return cls(seconds, rung, len(outcomes), tokens, kept)


class Switch:
    """Of one engine.

    Args:
        rungs: the guesses of each draft that it may make, numbered from 1 on; the last one has all that any has. So many
            tokens stand for the chains up to that length.
        sparing: the best depth is left so many times less often to see what others give, where a change of depth is dear.
    """

    def __init__(self, rungs: int | Sequence[Sequence[int]], *, sparing: int = 1) -> None:
        drafts = [range(size) for size in range(1, rungs + 1)] if isinstance(rungs, int) else rungs
        self._sparing, self._guesses = sparing, np.zeros((len(drafts), 1 + max(drafts[-1])), np.bool_)
        for number, guesses in enumerate(drafts):
            self._guesses[number, list(guesses)] = True
        self._of: dict[int, _Record] = {}
        self._last = _Record(self._guesses, sparing)

    def depth(self, rows: int) -> int:
        """The draft for each row of the next step, of which there are so many; 0 for a plain one."""
        return self._at(rows).depth()

    def note(self, outcomes: Sequence[Outcome], seconds: float, *, rung: int, rows: int | None = None) -> None:
        """A step of decodes alone, row by row, and its time with all that drafting took.

        Args:
            rung: the draft that was asked for; drafters may have made a shorter one, or none.
            rows: of it, where outcomes are of several rounds, whose mean time `seconds` is.
        """
        self._last = self._at(rows or len(outcomes))
        self._last.note(outcomes, seconds, rung)

    @property
    def speedup(self) -> float | None:
        """Of the last number of rows: tokens of a row's step with drafts, over its time relative to a plain one."""
        return self._last.speedup

    @property
    def best(self) -> int:
        """The draft that is made at the last number of rows; 0 where drafts are off."""
        return 0 if self._last.pause else self._last.best()

    def _at(self, rows: int) -> _Record:
        return self._of.setdefault((rows - 1).bit_length(), _Record(self._guesses, self._sparing))


class _Record:
    """Steps of one number of rows; `guesses` bool [drafts, guesses] says what each draft has.

    Attributes:
        pause: plain steps that are left before drafts are tried again; 0 where they are on.
    """

    def __init__(self, guesses: npt.NDArray[np.bool_], sparing: int) -> None:
        self._guesses, self._most, self._sparing = guesses, len(guesses), sparing
        self._plain: deque[float] = deque(maxlen=_KEPT)
        self._drafted: deque[_Step] = deque(maxlen=_KEPT)
        self._expected: npt.NDArray[np.float64] | None = None
        self.pause = 0
        self._next_pause = _PAUSE
        self._since_plain = self._tried = 0

    @property
    def speedup(self) -> float | None:
        if min(len(self._plain), len(self._drafted)) < _LEAST:
            return None
        tokens = sum(step.tokens for step in self._drafted) / sum(step.rows for step in self._drafted)
        seconds = statistics.median(step.seconds for step in self._drafted)
        return tokens * statistics.median(self._plain) / seconds

    def depth(self) -> int:
        if (
            self.pause
            or self._since_plain >= _REFRESH * self._sparing
            or len(self._plain) < min(_LEAST, len(self._drafted))
        ):
            return 0
        return self._most if self._tried % (_EXPLORE * self._sparing) == 0 else self.best()

    def best(self) -> int:
        """The draft with the most tokens for their time, by the acceptance of each guess."""
        if self._expected is None:
            self._expected = self._expect()
        return self._most if self._expected is None else 1 + int(self._expected.argmax())

    def _expect(self) -> npt.NDArray[np.float64] | None:
        """Speed-up that is expected of each draft, [drafts]; None before there are steps enough."""
        steps = self._drafted
        if min(len(self._plain), len(steps)) < _LEAST:
            return None
        plain, sizes = statistics.median(self._plain), self._guesses.sum(1)
        each = max(0.0, statistics.median((step.seconds - plain) / sizes[step.rung - 1] for step in steps))
        seconds = plain + each * sizes
        own: dict[int, list[float]] = {}
        for step in steps:
            own.setdefault(step.rung, []).append(step.seconds)
        for rung, times in own.items():
            if len(times) >= _TIMED:
                seconds[rung - 1] = statistics.median(times)
        asked = sum(step.rows * self._guesses[step.rung - 1] for step in steps)
        gains = 1 + self._guesses @ (sum(step.kept for step in steps) / np.maximum(asked, 1))
        found: npt.NDArray[np.float64] = gains * plain / seconds
        return found

    def note(self, outcomes: Sequence[Outcome], seconds: float, rung: int) -> None:
        if not rung or not any(row.drafted for row in outcomes):
            self._plain.append(seconds)
            self._since_plain = 0
            self.pause = max(0, self.pause - 1)
            self._expected = None
            return
        self._drafted.append(_Step.of(outcomes, seconds, rung, self._guesses.shape[1]))
        self._since_plain += 1
        self._tried += 1
        self._expected = found = self._expect()
        if found is None or self._tried < _LEAST:
            return
        if found.max() >= 1:
            if (self.speedup or 0) >= 1:  # and not only expected of a draft that is hardly tried yet
                self._next_pause = _PAUSE
        else:
            self.pause, self._next_pause = self._next_pause, min(2 * self._next_pause, _LONGEST_PAUSE)
            self._tried = 0
            self._drafted.clear()
            self._expected = None
