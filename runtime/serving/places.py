"""Which request has which row, and the blocks of rows in the pool."""

from __future__ import annotations

from typing import cast

import numpy as np

from optc.compiler.execution.block_manager import BlockManager
from optc.runtime.serving.plan import Piece, Request
from optc.runtime.serving.rows import Ints, Rows


class Places:
    """Requests in rows.

    Attributes:
        filling: rows whose prompts are being fed, by admission.
        late: by row and serial number, those that left a row with a token unread.
        computed: in the pool once the step that was planned last has been launched.
        grown: rows and columns of `Rows.tables` that are new since the plan before. moved: rows, from and to.
    """

    def __init__(self, manager: BlockManager, rows: Rows) -> None:
        assert manager.block_size == rows.block_size
        self.manager, self.rows = manager, rows
        self._at: list[Request | None] = [None] * rows.count
        self.filling: dict[int, None] = {}
        self.late: dict[tuple[int, int], Request] = {}
        self.computed: list[Piece] = []
        self.grown: list[tuple[int, int]] = []
        self.moved: list[tuple[int, int]] = []

    # -- requests ---------------------------------------------------------------------------

    @property
    def running(self) -> int:
        return self.rows.count - self.rows.free

    def find(self, row: int) -> Request | None:
        """The request of a row, if there is one."""
        return self._at[row]

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

    def all(self) -> list[Request]:
        """Every request that has a row."""
        return [found for found in self._at if found is not None]

    def unread(self, row: int) -> bool:
        """Whether a token of a row was chosen that the host has not."""
        return bool(self.rows.fed[row] >= self.rows.known[row])

    def read_late(self, request: Request) -> None:
        """Its next token is one of the row where it is now, wherever it may be when that is read."""
        self.late[request.row, int(self.rows.serial[request.row])] = request

    def enter(self, request: Request, found: int) -> None:
        """A request that the pool has begun gets a row; so many of its tokens are there."""
        row = self.rows.take(
            request.id,
            request.tokens,
            end=request.end,
            stops=request.stops,
            single=request.single,
            kind=request.kind,
            told=request.told,
            plain=request.plain,
        )
        request.row = row
        self._at[row] = request
        self.filling[row] = None
        self.rows.fed[row] = found
        self._note_blocks(row)

    def leave(self, request: Request, *, forget: bool = False) -> None:
        """Its row and its blocks are free; others do not find these where they are to be forgotten."""
        row = request.row
        self.computed = [piece for piece in self.computed if piece.row != row]
        self.filling.pop(row, None)
        self._at[row] = None
        self.rows.give_back(row)
        self.manager.free(request.id, forget=forget)
        request.row, request.told, request.plain = -1, int(self.rows.told[row]), bool(self.rows.plain[row])

    def compact(self) -> None:
        """Rows move where the first half of them, or less, could hold all."""
        if self.moved:
            return
        most = 1 << max(0, self.running - 1).bit_length()
        for row in range(most, self.rows.high if self.rows.high > most else 0):
            request = self._at[row]
            if request is None:
                continue
            if self.unread(row):
                self.read_late(request)
            new = self.rows.move(row)
            self._at[row], self._at[new], request.row = None, request, new
            self.filling = {new if other == row else other: None for other in self.filling}
            self.moved.append((row, new))
            self.grown += [(new, column) for column in range(int(self.rows.owned[new]))]

    # -- blocks -----------------------------------------------------------------------------

    def missing(self, rows: Ints | int, slots: Ints | int) -> int:
        """Blocks that these rows, or this one, miss together for so many tokens of each; less than 0 where they have more."""
        return int((-(-slots // self.manager.block_size) - self.rows.owned[rows]).sum())

    def promised(self) -> int:
        """Blocks that the rest of running prompts needs."""
        filling = np.fromiter(self.filling, np.int64)
        return self.missing(filling, self.rows.known[filling])

    def grow(self, row: int, slots: int) -> None:
        """Room for so many tokens of a row, for which enough blocks are free."""
        request, manager = self.at(row), self.manager
        manager.reserve([(request.id, slots - manager.length(request.id))])
        self._note_blocks(row)

    def grow_all(self, rows: Ints, slots: Ints) -> None:
        """Room for so many tokens of each of these rows, for which enough blocks are free."""
        manager, work = self.manager, []
        held = np.minimum(self.rows.fed[rows], self.rows.known[rows]).tolist()
        for request, count, wish in zip(self.requests(rows), held, slots.tolist(), strict=True):
            self.commit(request.row, count)
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
            self.rows.owned[row], self.rows.room[row] = new, new * self.manager.block_size
            self.grown += [(row, column) for column in range(old, new)]

    def commit_computed(self) -> None:
        """What the step before has computed can be found by others."""
        for piece in self.computed:
            if self._at[piece.row] is not None:
                self.commit(piece.row, piece.start + piece.size)
        self.computed.clear()

    def commit(self, row: int, count: int) -> None:
        """The pool holds the first tokens of a row."""
        manager, request = self.manager, self.at(row)
        held = manager.length(request.id)
        if count > held:
            manager.append(request.id, self.rows.history[row, held:count].tolist())
            manager.commit(request.id)

    def commit_fed(self, row: int) -> None:
        """The pool holds the tokens of a row that are known and fed."""
        self.commit(row, int(min(self.rows.fed[row], self.rows.known[row])))
