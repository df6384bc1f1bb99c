"""The requests that wait, and which of them is next; see `scheduler` for the rule."""

from __future__ import annotations

import heapq

from optc.runtime.serving.plan import Request


class Waiting:
    """Requests that wait.

    Args:
        patience: how often the one that arrived first may be overtaken before it is urgent.
    """

    def __init__(self, patience: int) -> None:
        self._patience = patience
        self._ranked: list[tuple[tuple[bool, int, int], int, Request]] = []  # heaps; what waits no longer is skipped
        self._oldest: list[tuple[int, int, Request]] = []
        self._pushed = 0  # keeps apart entries of one request
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, request: Request) -> None:
        """Let a request wait, for the first time or again."""
        request.waits = True
        self._count += 1
        self._pushed += 1
        heapq.heappush(self._ranked, (request.rank, self._pushed, request))
        heapq.heappush(self._oldest, (request.arrival, self._pushed, request))

    def remove(self, request: Request) -> None:
        """It waits no longer."""
        request.waits = False
        self._count -= 1

    def first(self) -> Request | None:
        """The one that is to be admitted next."""
        while self._ranked and not self._ranked[0][2].waits:
            heapq.heappop(self._ranked)
        oldest = self._first_arrival()
        if oldest is None:
            return None
        if oldest.urgent or oldest.overtaken < self._patience:
            return self._ranked[0][2]
        oldest.urgent = True
        self._pushed += 1
        heapq.heappush(self._ranked, (oldest.rank, self._pushed, oldest))
        return oldest

    def note_admission(self, request: Request) -> None:
        """A request has been admitted; the one that has waited for the longest may have been overtaken by it."""
        oldest = self._first_arrival()
        if oldest is not None and oldest.arrival < request.arrival:
            oldest.overtaken += 1

    def _first_arrival(self) -> Request | None:
        """The one that has waited for the longest."""
        while self._oldest and not self._oldest[0][2].waits:
            heapq.heappop(self._oldest)
        return self._oldest[0][2] if self._oldest else None
