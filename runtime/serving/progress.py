"""What becomes of each request: it waits, runs, gives way, gets tokens, and ends."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from optc.compiler.ops.dialect.sampling import NO_TOKEN
from optc.runtime.serving.places import Places
from optc.runtime.serving.plan import Chosen, Counts, Ended, Plan, Request
from optc.runtime.serving.request import Finish
from optc.runtime.serving.rows import Ints
from optc.runtime.serving.waiting import Waiting


class Progress:
    """All requests that have not ended.

    Attributes:
        requests: by name.
        refused_at: blocks that were free when the first in order did not fit; -1 where something has changed since.
    """

    def __init__(self, places: Places, waiting: Waiting) -> None:
        self._places, self._rows, self._waiting, self.counts = places, places.rows, waiting, Counts()
        self.requests: dict[str, Request] = {}
        self.refused_at = -1
        self._arrivals = 0

    def add(self, request: Request) -> None:
        """Let a request wait. It fits into the pool, alone."""
        manager = self._places.manager
        assert request.id not in self.requests
        assert request.end - 1 <= min(self._rows.capacity, manager.num_blocks * manager.block_size)
        request.arrival = self._arrivals
        self._arrivals += 1
        self.requests[request.id] = request
        self._wait(request)

    def admit(self, request: Request, found: int) -> None:
        """A request that waits, and that the pool has begun with so many tokens, runs."""
        self._waiting.remove(request)
        self._places.enter(request, found)
        if request.found is None:
            request.found = found
            self.counts.admissions += 1
            self.counts.prompt_tokens += request.prompt_length
            self.counts.cached_tokens += found
        self._waiting.note_admission(request)

    def give_way(self, request: Request) -> None:
        """Back to those that wait; its row and blocks are free."""
        row, places = request.row, self._places
        self.counts.preemptions += 1
        request.tokens = self._rows.tokens(row)
        if places.unread(row) and request not in places.late.values():  # it may have moved just before
            places.read_late(request)
        places.commit_fed(row)
        self._release(request)
        self._wait(request)

    def retire(self) -> None:
        """Rows of which the last token is being chosen make room for others, whose steps come behind it."""
        rows, places = self._rows, self._places
        for row in np.flatnonzero(rows.decoding & (rows.fed >= rows.end - 1)).tolist():
            request = places.at(row)
            places.read_late(request)
            request.tokens = rows.tokens(row)
            places.commit(row, len(request.tokens) - 1)  # what is fed last may turn out not to be finite
            self._release(request)

    def _wait(self, request: Request) -> None:
        self.refused_at = -1
        self._waiting.add(request)

    def _release(self, request: Request, *, forget: bool = False) -> None:
        self.refused_at = -1
        self._places.leave(request, forget=forget)

    # -- what steps gave --------------------------------------------------------------------

    def collect(self, plan: Plan, given: Chosen) -> list[Ended]:
        """Note the tokens of a step, and end the requests that end with one of them: what follows it is dropped."""
        rows, chosen = self._rows, plan.rows
        tokens, counts = given.tokens, given.counts
        ended: list[Ended] = []
        here = rows.serial[chosen] == plan.serials
        if not here.all():
            ended += self._collect_late(plan, given, here)
            chosen, tokens, counts = chosen[here], tokens[here], counts[here]
        columns = np.arange(tokens.shape[1])
        last = (tokens[:, :, None] == rows.stops[chosen][:, None]).any(2) | (tokens == NO_TOKEN)
        last |= rows.known[chosen][:, None] + columns + 1 >= rows.end[chosen][:, None]
        last &= columns < counts[:, None]
        over = last.any(1)
        counts = np.where(over, last.argmax(1) + 1, counts)
        self._note_tokens(chosen, tokens, counts)
        rows.fed[chosen] += counts - plan.steps
        for place in np.flatnonzero(over).tolist():
            request = self._places.at(int(chosen[place]))
            ended.append(self.end(request, self._reason(request, int(tokens[place, counts[place] - 1]))))
        return ended

    def _note_tokens(self, chosen: Ints, tokens: Ints, counts: Ints) -> None:
        """The first `counts` of tokens [R, W] are known of these rows."""
        rows, columns = self._rows, np.arange(tokens.shape[1])
        row, column = np.nonzero(columns < counts[:, None])
        rows.history[chosen[row], rows.known[chosen[row]] + column] = tokens[row, column]
        rows.known[chosen] += counts
        self.counts.generated_tokens += int(counts.sum())

    def _collect_late(self, plan: Plan, given: Chosen, here: np.ndarray) -> Iterator[Ended]:
        """Tokens of requests that have given way since, or moved, or ended."""
        for place in np.flatnonzero(~here).tolist():
            request = self._places.late.pop((int(plan.rows[place]), int(plan.serials[place])), None)
            if request is None or self.requests.get(request.id) is not request:
                continue
            for token in given.tokens[place, : given.counts[place]].tolist():
                known = self._append(request, token)
                if token in request.stops or token < 0 or known >= request.end:
                    yield self.end(request, self._reason(request, token))
                    break

    def _append(self, request: Request, token: int) -> int:
        """A request has one token more; how many it has then."""
        self.counts.generated_tokens += 1
        if request.row < 0:
            request.tokens.append(token)
            return len(request.tokens)
        self._rows.history[request.row, self._rows.known[request.row]] = token
        self._rows.known[request.row] += 1
        return int(self._rows.known[request.row])

    @staticmethod
    def _reason(request: Request, token: int) -> Finish:
        if token < 0:
            return "error"
        return "stop" if token in request.stops else request.end_reason

    def end(self, request: Request, finish: Finish) -> Ended:
        """Take a request out, with its tokens; what the pool holds of them can be found by others, unless it failed."""
        if request.row >= 0:
            tokens = self._rows.tokens(request.row)
            failed = finish == "error"
            if not failed:
                self._places.commit(request.row, min(int(self._rows.fed[request.row]), len(tokens) - 1))
            self._release(request, forget=failed)
        else:
            tokens = request.tokens
            if request.waits:
                self._waiting.remove(request)
                self.refused_at = -1
        if finish == "error":
            tokens = tokens[:-1]
        del self.requests[request.id]
        self.counts.finished[finish] = self.counts.finished.get(finish, 0) + 1
        return Ended(request, tokens, finish)
