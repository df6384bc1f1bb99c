"""Which tokens of which requests the next step computes. No model is needed: steps are planned, and told what they gave.

Requests wait, ordered by priority and then by arrival; they run as rows; and may go back to wait. A step feeds one token
of every row whose prompt is in, then prompts in chunks, as many tokens as the budget has left: those of running rows in
the order of their admission, then those of requests that wait.

Admission looks at blocks: the prompt, which the pool may hold in part, must fit beside what running prompts still need,
with a reserve for the growth of rows. The first request in order that does not fit keeps all behind it waiting.

When the pool is full while rows grow, the last of the running requests in order gives up its blocks and waits again,
with its tokens kept, which are computed again later (recomputation, as Kwon et al. 2023 call it, section 4.5,
https://arxiv.org/abs/2309.06180). Its full blocks stay findable until they are needed.

**No request starves.** Three rules make it so. (1) What can never fit alone is refused before it comes here, so the first
request in order always gets through: others give way to it, never it to them. (2) Of the waiting requests, the one that
arrived first may be overtaken, at admission, `patience` times; then it is urgent: before all others that wait, and the
last to give way, among urgent ones by arrival. (3) Prompts are fed in the order of admission and decodes leave a part of
the budget free, so an admitted prompt gets in. Each request is the first of those that wait for `patience` overtakings at
most, in all its life. So where k earlier ones have not ended when a request comes, it is admitted after at most
(k + 1) * (patience + 1) others have been admitted for the first time, whatever their priorities.

Tokens may be read late: `plan` may be called again before `collect` has told what the step before gave. A row whose last
token is being chosen is another request's from then on: steps run in their order, so nothing that it reads is written before.

Steps of decodes alone may be planned as one, to be launched without a pause: as many as the caller wants, while no prompt
can be fed, blocks that are free have room for all of them, and no row needs the host between two tokens. What comes
meanwhile waits until they have ended, so the caller bounds them by time. A row that ends among them computes on in the
slots that it has, which nobody reads; where requests wait for its place they end with it.

Drafted tokens (`Rows.drafted`) are fed behind the token of their row where prompts leave some of the budget and no other
request would have to give a block for them: speculation takes what is idle. Slots of those that are rejected are written
again, and hold nothing that others could find: blocks are told to others up to the tokens that were fed for good. With
drafts, each step is collected before the next one is planned.
"""

from __future__ import annotations

import numpy as np

from optc.compiler.execution.block_manager import BlockManager
from optc.runtime.serving.places import Places
from optc.runtime.serving.plan import Chosen, Ended, Piece, Plan, Request
from optc.runtime.serving.progress import Progress
from optc.runtime.serving.request import Finish
from optc.runtime.serving.rows import Ints, Kind, Rows
from optc.runtime.serving.waiting import Waiting

_RESERVE = 0.01
"""Of the blocks, that admission leaves free for the growth of rows that run."""


class Scheduler:
    """Plans steps over a block manager.

    Args:
        rows: most requests that run together, and most tokens of one.
        token_budget: most tokens of a step; more than rows, so that prompts get in.
        ahead: tokens beyond the one that is fed for which a row has room: steps that find the slot of the next one
            themselves need 1.
        compact: rows move where the first half of them, or less, could hold all: steps of the first rows are smaller then.
        patience: see above.
        forks: a prompt may begin in a copy of a block of which it shares a part.
    """

    def __init__(
        self,
        manager: BlockManager,
        rows: Rows,
        *,
        token_budget: int,
        ahead: int = 0,
        compact: bool = False,
        patience: int = 256,
        forks: bool = False,
    ) -> None:
        assert token_budget > rows.count, "decodes of all rows leave a part of the budget free"
        self.manager, self.rows = manager, rows
        self.places, self._waiting = Places(manager, rows), Waiting(patience)
        self.progress = Progress(self.places, self._waiting)
        self.counts = self.progress.counts
        self._budget, self._ahead, self._compacts, self._forks = token_budget, ahead, compact, forks
        self._reserve = int(manager.num_blocks * _RESERVE) + 1
        self._copied: dict[int, int] = {}

    # -- requests ---------------------------------------------------------------------------

    @property
    def running(self) -> int:
        return self.places.running

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def __contains__(self, identity: str) -> bool:
        return identity in self.progress.requests

    def at(self, row: int) -> Request:
        """The request of a row."""
        return self.places.at(row)

    def add(self, request: Request) -> None:
        """Let a request wait. It fits into the pool, alone."""
        self.progress.add(request)

    def cancel(self, identity: str) -> Ended | None:
        """End a request; None where there is none of this name."""
        return self.end(identity, "cancelled")

    def end(self, identity: str, finish: Finish) -> Ended | None:
        """End a request for a reason that is not its tokens'; None where there is none of this name."""
        request = self.progress.requests.get(identity)
        return None if request is None else self.progress.end(request, finish)

    def collect(self, plan: Plan, given: Chosen) -> list[Ended]:
        """Note the tokens of a step, and end the requests that end with one of them: what follows it is dropped."""
        return self.progress.collect(plan, given)

    # -- planning ---------------------------------------------------------------------------

    def plan(self, most_steps: int = 1) -> Plan | None:
        """The next step, or as many of decodes alone as may follow each other; None where nothing can be fed before more is
        collected."""
        rows, places, before = self.rows, self.places, self.counts.preemptions
        places.commit_computed()
        self.progress.retire()
        if self._compacts:
            places.compact()
        decodes = self._decodes()
        pieces: list[Piece] = []
        budget = self._budget - len(decodes)
        for row in list(places.filling):
            if budget > 0 and row in places.filling:
                budget -= self._feed(row, budget, pieces)
        if before == self.counts.preemptions:  # else what gave way would take its blocks back at once
            self._admit(budget, pieces)
        decodes = decodes[rows.decoding[decodes]]
        pieces = [piece for piece in pieces if places.find(piece.row) is not None]
        if not len(decodes) and not pieces:
            return None
        positions = rows.fed[decodes]
        drafted = self._take_drafts(decodes, self._budget - len(decodes) - sum(piece.size for piece in pieces))
        steps = 1 if pieces or most_steps == 1 else self._steps(decodes, most_steps)
        rows.fed[decodes] += steps
        for piece in pieces:
            self._lay_out(piece)
        last = [piece.row for piece in pieces if piece.last]
        chosen = np.concatenate([decodes, np.array(last, np.int64)]) if last else decodes
        self.counts.steps += steps
        grown, places.grown = places.grown, []
        moved, places.moved = places.moved, []
        copied, self._copied = self._copied, {}
        serials, shape = rows.serial[chosen], rows.shape if drafted.any() else None
        return Plan(decodes, positions, drafted, pieces, chosen, serials, grown, moved, steps, copied, shape)

    def _decodes(self) -> Ints:
        """Rows that feed one token, with room for it."""
        rows, places = self.rows, self.places
        ready = np.flatnonzero(rows.decoding & (rows.fed < rows.end - 1) & (~rows.single | (rows.fed < rows.known)))
        wanted = np.minimum(rows.fed[ready] + self._ahead, rows.end[ready] - 2) + 1
        short = wanted > rows.room[ready]
        full, slots = ready[short], wanted[short]
        if not len(full):
            return ready
        if places.missing(full, slots) <= self.manager.free_blocks:
            places.grow_all(full, slots)
            return ready
        wishes = dict(zip(full.tolist(), slots.tolist(), strict=True))
        for row in sorted(wishes, key=lambda row: places.at(row).rank):
            if places.find(row) is not None:
                places.commit_fed(row)
                self._grow(row, wishes[row])
        return ready[rows.decoding[ready]]

    def _steps(self, decodes: Ints, most: int) -> int:
        """How many steps of these rows may follow each other; they have room for them then, and nobody gave way for it."""
        rows = self.rows
        if (rows.kind[decodes] == Kind.OPEN).any():
            return 1
        fed, end, room = rows.fed[decodes], rows.end[decodes] - 1, rows.room[decodes]
        until = end if len(self._waiting) else np.maximum(end, np.minimum(room, rows.capacity))
        steps = min(most, int((until - fed).min()))
        wanted = np.minimum(fed + steps - 1 + self._ahead, end - 1) + 1
        short = wanted > room
        full, slots = decodes[short], wanted[short]
        if self.places.missing(full, slots) > self.manager.free_blocks:
            return min(steps, int((room - self._ahead - fed)[room < end].min()))
        self.places.grow_all(full, slots)
        return steps

    def _take_drafts(self, decodes: Ints, budget: int) -> Ints:
        """How many of its drafted tokens each of these rows is fed, in what is left of budget and blocks."""
        rows, places, taken = self.rows, self.places, self.rows.drafted[decodes]
        rows.drafted[:] = 0
        drafting = np.flatnonzero(taken)
        if not len(drafting):
            return taken
        assert not self._ahead, "a draft continues a token that the host has read"
        taken[drafting] = np.minimum(taken[drafting], budget // len(drafting))
        spare = self.manager.free_blocks - places.promised()
        for place in drafting.tolist():
            row = int(decodes[place])
            known = int(rows.known[row])
            missing = min(places.missing(row, known + int(taken[place])), spare)
            if missing > 0:
                places.commit(row, int(rows.fed[row]))
                places.grow(row, (int(rows.owned[row]) + missing) * rows.block_size)
                spare -= missing
            taken[place] = min(int(taken[place]), int(rows.room[row]) - known)
        return taken

    def _feed(self, row: int, budget: int, pieces: list[Piece]) -> int:
        """Plan the next tokens of a prompt; returns how many."""
        start = int(self.rows.fed[row])
        count = min(budget, int(self.rows.known[row]) - start)
        if not self._grow(row, start + count):
            return 0
        pieces.append(Piece(row, start, count, start + count == int(self.rows.known[row])))
        return count

    def _lay_out(self, piece: Piece) -> None:
        self.rows.fed[piece.row] += piece.size
        self.places.computed.append(piece)
        if piece.last:
            del self.places.filling[piece.row]
            self.rows.decoding[piece.row] = True

    def _grow(self, row: int, slots: int) -> bool:
        """Room for so many tokens of a row. Others give way, or it does: False then."""
        places, missing = self.places, self.places.missing(row, slots)
        if missing <= 0:
            return True
        request = places.at(row)
        while self.manager.free_blocks < missing:
            last = max(places.all(), key=lambda other: other.rank)
            self.progress.give_way(last)
            if last is request:
                return False
        places.grow(row, slots)
        return True

    # -- admission --------------------------------------------------------------------------

    def _admit(self, budget: int, pieces: list[Piece]) -> None:
        """Requests that wait, in order, while there are rows, blocks and budget."""
        size = self.manager.block_size
        begun: set[tuple[int, ...]] = set()
        while budget > 0 and self.rows.free and (request := self._waiting.first()) is not None:
            first = tuple(request.tokens[:size])
            if first in begun or self.manager.free_blocks <= self.progress.refused_at:
                return  # what another one computes in this step is found in the next; or nothing has changed
            if not self._place(request):
                self.progress.refused_at = self.manager.free_blocks
                return
            if len(request.tokens) > size:
                begun.add(first)
            fed = self._feed(request.row, budget, pieces)
            if not fed:
                return
            budget -= fed

    def _place(self, request: Request) -> bool:
        """Give a request a row and what the pool holds of its tokens, if the rest fits."""
        manager, size = self.manager, self.manager.block_size
        alone = not self.running
        found = manager.start(request.id, request.tokens)
        missing = -(-(len(request.tokens) + 1) // size) - found // size
        spare = 0 if alone else self._reserve
        if not alone and manager.free_blocks - self.places.promised() < missing + spare:
            manager.free(request.id)
            return False
        fork = manager.fork(request.id, request.tokens) if self._forks else None
        if fork is not None:
            self._copied[fork.target] = fork.source
            found += fork.tokens
        self.progress.admit(request, found)
        return True
