"""The rows of an engine on its device: tokens, positions, slots, lengths, tables and draws, written only where they change.

A row's place is the same in every step, so a step of all of them needs nothing from the host: each leaves the inputs of the
next one (`advance_step_`). What the host brings are rows that join or leave, new blocks, and how a new row draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from optc.compiler.ops.dialect.paged import PADDING
from optc.runtime.serving.rows import Ints, Kind, Rows
from optc.runtime.sessions.decode_step import StepState
from optc.runtime.sessions.row_draws import RowDraws
from optc.runtime.sessions.streaming import Draw

DrawOf = Callable[[int], Draw]
"""How the tokens of a row are drawn."""


class StepBuffers:
    """The device's half of `Rows`.

    Attributes:
        state: of all rows, and one more that is nobody's.
        nobody: its number.
    """

    def __init__(self, rows: Rows, vocabulary: int, device: torch.device, draw_of: DrawOf) -> None:
        self._rows, self._vocabulary, self._device, self._draw_of = rows, vocabulary, device, draw_of
        self.nobody = rows.count
        self.state = StepState(rows.count + 1, rows.tables.shape[1], device)
        self._draws: dict[Kind, RowDraws] = {}
        self._right = np.zeros(rows.count, np.bool_)  # what the device holds of them is what the next step is to read
        self._real = np.zeros(rows.count, np.bool_)  # are not padding on the device

    def send(self, values: npt.NDArray[np.generic]) -> Tensor:
        """A copy on the device, in the order of what is launched there."""
        tensor = torch.from_numpy(np.ascontiguousarray(values))
        if self._device.type != "cuda":
            return tensor.to(self._device)
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def bring(self, tensor: Tensor) -> Tensor:
        """A copy on the host, there when what was launched so far has ended."""
        if tensor.device.type != "cuda":
            return tensor.clone()
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    def move(self, moved: Sequence[tuple[int, int]]) -> None:
        """Requests have other rows: from, to. Their tables are told by `grow`."""
        if moved:
            at = np.array(moved, np.int64).T
            old, new = self.send(at)
            self.state.ids.index_copy_(0, new, self.state.ids.index_select(0, old))
            for draws in self._draws.values():
                draws.move(old, new)
            self._right[at.ravel()] = False

    def grow(self, grown: Sequence[tuple[int, int]]) -> None:
        """Tables are new at these rows and columns."""
        if grown:
            at = np.array(grown, np.int64)
            values = self._rows.tables[at[:, 0], at[:, 1]]
            sent = self.send(np.stack([at[:, 0] * self.state.width + at[:, 1], values]))
            self.state.tables.view(-1).index_copy_(0, sent[0], sent[1].int())

    def decode(self, rows: Ints, positions: Ints) -> None:
        """The next step feeds one token of these rows, at these positions, and none of others."""
        wanted = np.zeros_like(self._right)
        wanted[rows] = True
        new = wanted[rows] & ~self._right[rows]
        old = np.flatnonzero(self._real & ~wanted)
        if new.any() or len(old):
            joining, at = rows[new], positions[new]
            size = self._rows.block_size
            slots = self._rows.tables[joining, at // size].astype(np.int64) * size + at % size
            padding = np.zeros_like(old)
            sent = self.send(
                np.stack(
                    [
                        np.concatenate([joining, old]),
                        np.concatenate([at, padding]),
                        np.concatenate([slots, padding + PADDING]),
                        np.concatenate([at + 1, padding]),
                    ]
                )
            )
            self.state.integers[1:].index_copy_(1, sent[0], sent[1:3])
            self.state.lengths.index_copy_(0, sent[0], sent[3].int())
        self._right = wanted
        self._real = wanted.copy()

    def overtaken(self) -> None:
        """Rows were fed by a call that did not leave the inputs of the next step, but for the tokens."""
        self._right[:] = False

    def draws(self, kind: Kind) -> RowDraws | None:
        """What rows draw by, with tables of their tokens where it is `PENALIZED`; None where it is `GREEDY`."""
        if kind == Kind.GREEDY:
            return None
        if kind not in self._draws:
            tables = self._vocabulary if kind == Kind.PENALIZED else None
            self._draws[kind] = RowDraws(self.nobody + 1, self._device, tables)
            running = np.flatnonzero(self._rows.decoding & (self._rows.kind != Kind.GREEDY))
            self._set_draws(self._draws[kind], running.tolist())
        return self._draws[kind]

    def join(self, rows: Sequence[int]) -> None:
        """Rows begin to choose: how they draw is new."""
        for draws in self._draws.values():
            self._set_draws(draws, rows)

    def _set_draws(self, draws: RowDraws, rows: Sequence[int]) -> None:
        if rows:
            kinds = self._rows.kind
            chosen = [Draw() if kinds[row] == Kind.GREEDY else self._draw_of(row) for row in rows]
            draws.set(self.send(np.array(rows, np.int64)), chosen, [self._rows.tokens(row) for row in rows])
