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

import heapq
from collections.abc import Iterator
from typing import cast

import numpy as np

from optc.compiler.execution.block_manager import BlockManager
from optc.compiler.ops.dialect.sampling import NO_TOKEN
from optc.runtime.serving.plan import Chosen, Counts, Ended, Piece, Plan, Request
from optc.runtime.serving.request import Finish
from optc.runtime.serving.rows import Ints, Kind, Rows

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
        assert manager.block_size == rows.block_size
        self.manager, self.rows, self.counts = manager, rows, Counts()
        self._budget, self._ahead, self._patience = token_budget, ahead, patience
        self._reserve = int(manager.num_blocks * _RESERVE) + 1
        self._requests: dict[str, Request] = {}  # that have not ended
        self._at: list[Request | None] = [None] * rows.count
        self._filling: dict[int, None] = {}  # rows whose prompts are being fed, by admission
        self._ranked: list[tuple[tuple[bool, int, int], int, Request]] = []  # heaps; what waits no longer is skipped
        self._oldest: list[tuple[int, int, Request]] = []
        self._pushed = 0  # keeps apart entries of one request
        self._arrivals = 0
        self._waiting = 0
        self._refused_at = -1  # blocks that were free when the first in order did not fit
        self._late: dict[tuple[int, int], Request] = {}  # (row, serial) of those that gave way with a token unread
        self._computed: list[Piece] = []  # in the pool once the step that was planned last has been launched
        self._compacts, self._forks = compact, forks
        self._grown: list[tuple[int, int]] = []
        self._moved: list[tuple[int, int]] = []
        self._copied: dict[int, int] = {}

    # -- requests ---------------------------------------------------------------------------

    @property
    def running(self) -> int:
        return self.rows.count - self.rows.free

    @property
    def waiting(self) -> int:
        return self._waiting

    def __contains__(self, identity: str) -> bool:
        return identity in self._requests

    def at(self, row: int) -> Request:
        """The request of a row."""
        found = self._at[row]
        assert found is not None
        return found

    def requests(self, rows: Ints) -> list[Request]:
        """The requests of rows, each of which has one."""
        found = [self._at[row] for row in rows.tolist()]
        assert None not in found
        return cast("list[Request]", found)

    def request_of(self, row: int, serial: int) -> Request | None:
        """The request that had the row when it had this serial number; None where it ended."""
        if self.rows.serial[row] == serial:
            return self._at[row]
        found = self._late.get((row, serial))
        return found if found is not None and self._requests.get(found.id) is found else None

    def add(self, request: Request) -> None:
        """Let a request wait. It fits into the pool, alone."""
        assert request.id not in self._requests
        assert request.end - 1 <= min(self.rows.capacity, self.manager.num_blocks * self.manager.block_size)
        request.arrival = self._arrivals
        self._arrivals += 1
        self._requests[request.id] = request
        self._wait(request)

    def cancel(self, identity: str) -> Ended | None:
        """End a request; None where there is none of this name."""
        return self.end(identity, "cancelled")

    def end(self, identity: str, finish: Finish) -> Ended | None:
        """End a request for a reason that is not its tokens'; None where there is none of this name."""
        request = self._requests.get(identity)
        return None if request is None else self._end(request, finish)

    def _wait(self, request: Request) -> None:
        request.waits = True
        self._waiting += 1
        self._refused_at = -1
        self._pushed += 1
        heapq.heappush(self._ranked, (request.rank, self._pushed, request))
        heapq.heappush(self._oldest, (request.arrival, self._pushed, request))

    def _first(self) -> Request | None:
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

    def _first_arrival(self) -> Request | None:
        """The one that has waited for the longest."""
        while self._oldest and not self._oldest[0][2].waits:
            heapq.heappop(self._oldest)
        return self._oldest[0][2] if self._oldest else None

    # -- planning ---------------------------------------------------------------------------

    def plan(self, most_steps: int = 1) -> Plan | None:
        """The next step, or as many of decodes alone as may follow each other; None where nothing can be fed before more is
        collected."""
        self._commit_computed()
        self._retire()
        if self._compacts and not self._moved:
            self._compact()
        rows, before = self.rows, self.counts.preemptions
        decodes = self._decodes()
        pieces: list[Piece] = []
        budget = self._budget - len(decodes)
        for row in list(self._filling):
            if budget > 0 and row in self._filling:
                budget -= self._feed(row, budget, pieces)
        if before == self.counts.preemptions:  # else what gave way would take its blocks back at once
            self._admit(budget, pieces)
        decodes = decodes[rows.decoding[decodes]]
        pieces = [piece for piece in pieces if self._at[piece.row] is not None]
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
        grown, self._grown = self._grown, []
        moved, self._moved = self._moved, []
        copied, self._copied = self._copied, {}
        serials, shape = rows.serial[chosen], rows.shape if drafted.any() else None
        return Plan(decodes, positions, drafted, pieces, chosen, serials, grown, moved, steps, copied, shape)

    def _retire(self) -> None:
        """Rows of which the last token is being chosen make room for others, whose steps come behind it."""
        rows = self.rows
        for row in np.flatnonzero(rows.decoding & (rows.fed >= rows.end - 1)).tolist():
            request = self.at(row)
            self._late[row, int(rows.serial[row])] = request
            request.tokens = rows.tokens(row)
            self._commit(row, len(request.tokens) - 1)  # what is fed last may turn out not to be finite
            self._release(request)

    def _compact(self) -> None:
        """See `compact`."""
        most = 1 << max(0, self.running - 1).bit_length()
        for row in range(most, self.rows.high if self.rows.high > most else 0):
            request = self._at[row]
            if request is None:
                continue
            if self._unread(row):
                self._late[row, int(self.rows.serial[row])] = request
            new = self.rows.move(row)
            self._at[row], self._at[new], request.row = None, request, new
            self._filling = {new if other == row else other: None for other in self._filling}
            self._moved.append((row, new))
            self._grown += [(new, column) for column in range(int(self.rows.owned[new]))]

    def _unread(self, row: int) -> bool:
        """Whether a token of a row was chosen that the host has not."""
        return bool(self.rows.fed[row] >= self.rows.known[row])

    def _decodes(self) -> Ints:
        """Rows that feed one token, with room for it."""
        rows = self.rows
        ready = np.flatnonzero(rows.decoding & (rows.fed < rows.end - 1) & (~rows.single | (rows.fed < rows.known)))
        wanted = np.minimum(rows.fed[ready] + self._ahead, rows.end[ready] - 2) + 1
        short = wanted > rows.room[ready]
        full, slots = ready[short], wanted[short]
        if not len(full):
            return ready
        if self._blocks_for(full, slots) <= self.manager.free_blocks:
            self._grow_all(full, slots)
            return ready
        wishes = dict(zip(full.tolist(), slots.tolist(), strict=True))
        for row in sorted(wishes, key=lambda row: self.at(row).rank):
            if self._at[row] is not None:
                self._commit(row, int(min(rows.fed[row], rows.known[row])))
                self._grow(row, wishes[row])
        return ready[rows.decoding[ready]]

    def _steps(self, decodes: Ints, most: int) -> int:
        """How many steps of these rows may follow each other; they have room for them then, and nobody gave way for it."""
        rows = self.rows
        if (rows.kind[decodes] == Kind.OPEN).any():
            return 1
        fed, end, room = rows.fed[decodes], rows.end[decodes] - 1, rows.room[decodes]
        until = end if self._waiting else np.maximum(end, np.minimum(room, rows.capacity))
        steps = min(most, int((until - fed).min()))
        wanted = np.minimum(fed + steps - 1 + self._ahead, end - 1) + 1
        short = wanted > room
        full, slots = decodes[short], wanted[short]
        if self._blocks_for(full, slots) > self.manager.free_blocks:
            return min(steps, int((room - self._ahead - fed)[room < end].min()))
        self._grow_all(full, slots)
        return steps

    def _take_drafts(self, decodes: Ints, budget: int) -> Ints:
        """How many of its drafted tokens each of these rows is fed, in what is left of budget and blocks."""
        rows, taken = self.rows, self.rows.drafted[decodes]
        rows.drafted[:] = 0
        drafting = np.flatnonzero(taken)
        if not len(drafting):
            return taken
        assert not self._ahead, "a draft continues a token that the host has read"
        taken[drafting] = np.minimum(taken[drafting], budget // len(drafting))
        spare = self.manager.free_blocks - self._promised()
        for place in drafting.tolist():
            row, size = int(decodes[place]), rows.block_size
            known = int(rows.known[row])
            missing = min(-(-(known + int(taken[place])) // size) - int(rows.owned[row]), spare)
            if missing > 0:
                self._commit(row, int(rows.fed[row]))
                self._grow(row, (int(rows.owned[row]) + missing) * size)
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
        self._computed.append(piece)
        if piece.last:
            del self._filling[piece.row]
            self.rows.decoding[piece.row] = True

    def _admit(self, budget: int, pieces: list[Piece]) -> None:
        """Requests that wait, in order, while there are rows, blocks and budget."""
        size = self.manager.block_size
        begun: set[tuple[int, ...]] = set()
        while budget > 0 and self.rows.free and (request := self._first()) is not None:
            first = tuple(request.tokens[:size])
            if first in begun or self.manager.free_blocks <= self._refused_at:
                return  # what another one computes in this step is found in the next; or nothing has changed
            if not self._place(request):
                self._refused_at = self.manager.free_blocks
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
        if not alone and manager.free_blocks - self._promised() < missing + spare:
            manager.free(request.id)
            return False
        fork = manager.fork(request.id, request.tokens) if self._forks else None
        if fork is not None:
            self._copied[fork.target] = fork.source
            found += fork.tokens
        row = self.rows.take(
            request.tokens, end=request.end, stops=request.stops, single=request.single, kind=request.kind
        )
        request.row, request.waits = row, False
        self._at[row] = request
        self._filling[row] = None
        self._waiting -= 1
        self.rows.fed[row] = found
        self._note_blocks(row)
        self._count_admission(request, found)
        return True

    def _promised(self) -> int:
        """Blocks that the rest of running prompts needs."""
        filling = np.fromiter(self._filling, np.int64)
        return self._blocks_for(filling, self.rows.known[filling])

    def _count_admission(self, request: Request, found: int) -> None:
        if request.found is None:
            request.found = found
            self.counts.admissions += 1
            self.counts.prompt_tokens += request.prompt_length
            self.counts.cached_tokens += found
        oldest = self._first_arrival()
        if oldest is not None and oldest.arrival < request.arrival:
            oldest.overtaken += 1

    # -- blocks -----------------------------------------------------------------------------

    def _grow(self, row: int, slots: int) -> bool:
        """Room for so many tokens of a row. Others give way, or it does: False then."""
        rows, manager, request = self.rows, self.manager, self.at(row)
        missing = -(-slots // manager.block_size) - int(rows.owned[row])
        if missing <= 0:
            return True
        while manager.free_blocks < missing:
            last = max((other for other in self._at if other is not None), key=lambda other: other.rank)
            self._give_way(last)
            if last is request:
                return False
        manager.reserve([(request.id, slots - manager.length(request.id))])
        self._note_blocks(row)
        return True

    def _blocks_for(self, rows: Ints, slots: Ints) -> int:
        """Blocks that these rows miss for so many tokens of each, more than they have room for."""
        return int((-(-slots // self.manager.block_size) - self.rows.owned[rows]).sum())

    def _grow_all(self, rows: Ints, slots: Ints) -> None:
        """Room for so many tokens of each of these rows, for which enough blocks are free."""
        manager, work = self.manager, []
        held = np.minimum(self.rows.fed[rows], self.rows.known[rows]).tolist()
        for request, count, wish in zip(self.requests(rows), held, slots.tolist(), strict=True):
            self._commit(request.row, count)
            work.append((request.id, wish - manager.length(request.id)))
        manager.reserve(work)
        for row in rows.tolist():
            self._note_blocks(row)

    def _note_blocks(self, row: int) -> None:
        """Take over the blocks of a row that are new."""
        blocks = self.manager.blocks(self.at(row).id)
        old, new = int(self.rows.owned[row]), len(blocks)
        if new > old:
            self.rows.tables[row, old:new] = blocks[old:]
            self.rows.owned[row] = new
            self.rows.room[row] = new * self.manager.block_size
            self._grown += [(row, column) for column in range(old, new)]

    def _commit_computed(self) -> None:
        """What the step before has computed can be found by others."""
        for piece in self._computed:
            request = self._at[piece.row]
            if request is not None:
                self._commit(piece.row, piece.start + piece.size)
        self._computed.clear()

    def _commit(self, row: int, count: int) -> None:
        """The pool holds the first tokens of a row."""
        manager, request = self.manager, self.at(row)
        held = manager.length(request.id)
        if count > held:
            manager.append(request.id, self.rows.history[row, held:count].tolist())
            manager.commit(request.id)

    def _give_way(self, request: Request) -> None:
        """Back to those that wait; its row and blocks are free."""
        row, rows = request.row, self.rows
        self.counts.preemptions += 1
        request.tokens = rows.tokens(row)
        if self._unread(row) and request not in self._late.values():  # it may have moved just before
            self._late[row, int(rows.serial[row])] = request
        self._commit(row, int(min(rows.fed[row], rows.known[row])))
        self._release(request)
        self._wait(request)

    def _release(self, request: Request, *, forget: bool = False) -> None:
        row = request.row
        self._computed = [piece for piece in self._computed if piece.row != row]
        self._filling.pop(row, None)
        self._at[row] = None
        self.rows.give_back(row)
        self.manager.free(request.id, forget=forget)
        request.row, self._refused_at = -1, -1

    # -- what steps gave --------------------------------------------------------------------

    def collect(self, plan: Plan, given: Chosen) -> list[Ended]:
        """Note the tokens of a step, and end the requests that end with one of them: what follows it is dropped."""
        rows, chosen = self.rows, plan.rows
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
            request = self.at(int(chosen[place]))
            ended.append(self._end(request, self._reason(request, int(tokens[place, counts[place] - 1]))))
        return ended

    def _note_tokens(self, chosen: Ints, tokens: Ints, counts: Ints) -> None:
        """The first `counts` of tokens [R, W] are known of these rows."""
        rows, columns = self.rows, np.arange(tokens.shape[1])
        row, column = np.nonzero(columns < counts[:, None])
        rows.history[chosen[row], rows.known[chosen[row]] + column] = tokens[row, column]
        rows.known[chosen] += counts
        self.counts.generated_tokens += int(counts.sum())

    def _collect_late(self, plan: Plan, given: Chosen, here: np.ndarray) -> Iterator[Ended]:
        """Tokens of requests that have given way since, or moved, or ended."""
        for place in np.flatnonzero(~here).tolist():
            request = self._late.pop((int(plan.rows[place]), int(plan.serials[place])), None)
            if request is None or self._requests.get(request.id) is not request:
                continue
            for token in given.tokens[place, : given.counts[place]].tolist():
                known = self._append(request, token)
                if token in request.stops or token < 0 or known >= request.end:
                    yield self._end(request, self._reason(request, token))
                    break

    def _append(self, request: Request, token: int) -> int:
        """A request has one token more; how many it has then."""
        self.counts.generated_tokens += 1
        if request.row < 0:
            request.tokens.append(token)
            return len(request.tokens)
        self.rows.history[request.row, self.rows.known[request.row]] = token
        self.rows.known[request.row] += 1
        return int(self.rows.known[request.row])

    @staticmethod
    def _reason(request: Request, token: int) -> Finish:
        if token < 0:
            return "error"
        return "stop" if token in request.stops else request.end_reason

    def _end(self, request: Request, finish: Finish) -> Ended:
        """Take a request out, with its tokens; what the pool holds of them can be found by others, unless it failed."""
        if request.row >= 0:
            tokens = self.rows.tokens(request.row)
            failed = finish == "error"
            if not failed:
                self._commit(request.row, min(int(self.rows.fed[request.row]), len(tokens) - 1))
            self._release(request, forget=failed)
        else:
            tokens = request.tokens
            if request.waits:
                request.waits = False
                self._waiting -= 1
                self._refused_at = -1
        if finish == "error":
            tokens = tokens[:-1]
        del self._requests[request.id]
        self.counts.finished[finish] = self.counts.finished.get(finish, 0) + 1
        return Ended(request, tokens, finish)
