"""What one input takes of memory: by itself, whatever the process held before."""

from __future__ import annotations

import gc
import os
import resource

LIMIT_BYTES, RESTART_BYTES = 2 << 30, 1 << 30
"""What one input may take; and what a process may hold beyond its start before an input, for which another one goes on."""
_EXACT_BYTES = 64 << 20


class InputMemory:
    """Peaks of resident memory of a process and of its forks, input by input.

    The kernel tells the peak of a whole life. So an input has taken what the peak lies above what was held before it, if
    the peak is new; where an old one is far above, it is set back first (`clear_refs`, proc(5)). Less than `_EXACT_BYTES`
    may go unseen.

    Attributes:
        most: of one input, so far.
    """

    def __init__(self) -> None:
        self._statm = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
        self._clear = os.open("/proc/self/clear_refs", os.O_WRONLY | os.O_CLOEXEC)
        self._start = self._before = self._held()
        self._peaks, self.most = _peaks(), 0

    def _held(self) -> int:
        return int(os.pread(self._statm, 200, 0).split()[1]) * resource.getpagesize()

    def is_full(self) -> bool:
        """Whether the process holds so much more than at its start that an input would be blamed for it."""
        if self._held() - self._start <= RESTART_BYTES:
            return False
        gc.collect()  # errors hold what was read in cycles
        return self._held() - self._start > RESTART_BYTES

    def begin(self) -> None:
        """An input is about to be read."""
        self._before = self._held()
        if _peaks()[0] > self._before + _EXACT_BYTES:
            os.write(self._clear, b"5")
        self._peaks = _peaks()

    def taken(self) -> int:
        """Bytes that it took."""
        new = [peak for peak, old in zip(_peaks(), self._peaks, strict=True) if peak > old]
        found = max(0, max(new, default=0) - self._before)
        self.most = max(self.most, found)
        return found


def _peaks() -> tuple[int, int]:
    """Of this process, and of the largest of its forks that have ended."""
    own, forks = (resource.getrusage(who).ru_maxrss * 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own, forks
