"""Whether drafting pays, by what steps of so many rows gave and took so far: where it does not, decoding is plain."""

from __future__ import annotations

import statistics
from collections import deque

_KEPT = 32
"""Steps of each kind that are looked at."""
_LEAST = 8
"""Steps of each kind before anything is decided."""
_REFRESH = 32
"""While drafts are on, one step in so many is plain, so that its time stays known."""
_PAUSE, _LONGEST_PAUSE = 64, 4096
"""Plain steps before drafts are tried again; twice as many each time that they do not pay."""


class Switch:
    """Of one engine. Steps of different numbers of rows cost differently: each power of two is decided by itself."""

    def __init__(self) -> None:
        self._of: dict[int, _Record] = {}
        self._last = _Record()

    def wants(self, rows: int) -> bool:
        """Whether the next step, of so many rows, should have drafts."""
        return self._at(rows).wants()

    def note(self, rows: int, *, tokens: int, seconds: float, drafted: bool) -> None:
        """A step of decodes alone: tokens that it gave, and its time with all that drafting took."""
        self._last = self._at(rows)
        self._last.note(tokens / rows, seconds, drafted)

    @property
    def speedup(self) -> float | None:
        """Of the last number of rows: tokens of a row's step with drafts, over its time relative to a plain one."""
        return self._last.speedup

    @property
    def on(self) -> bool:
        """Whether drafts are on, at the last number of rows."""
        return self._last.pause == 0

    def _at(self, rows: int) -> _Record:
        return self._of.setdefault((rows - 1).bit_length(), _Record())


class _Record:
    """Steps of one number of rows.

    Attributes:
        pause: plain steps that are left before drafts are tried again; 0 where they are on.
    """

    def __init__(self) -> None:
        self._plain: deque[float] = deque(maxlen=_KEPT)
        self._drafted: deque[float] = deque(maxlen=_KEPT)
        self._tokens: deque[float] = deque(maxlen=_KEPT)
        self.pause = 0
        self._next_pause = _PAUSE
        self._since_plain = 0
        self._tried = 0

    @property
    def speedup(self) -> float | None:
        if min(len(self._plain), len(self._drafted)) < _LEAST:
            return None
        return statistics.fmean(self._tokens) * statistics.median(self._plain) / statistics.median(self._drafted)

    def wants(self) -> bool:
        if self.pause:
            return False
        if len(self._plain) < min(_LEAST, len(self._drafted)):
            return False
        return self._since_plain < _REFRESH

    def note(self, tokens: float, seconds: float, drafted: bool) -> None:
        if not drafted:
            self._plain.append(seconds)
            self._since_plain = 0
            self.pause = max(0, self.pause - 1)
            return
        self._drafted.append(seconds)
        self._tokens.append(tokens)
        self._since_plain += 1
        self._tried += 1
        found = self.speedup
        if found is None or self._tried < _LEAST:
            return
        if found >= 1:
            self._next_pause = _PAUSE
        else:
            self.pause, self._next_pause = self._next_pause, min(2 * self._next_pause, _LONGEST_PAUSE)
            self._tried = 0
            self._drafted.clear()
            self._tokens.clear()
