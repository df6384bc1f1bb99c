"""One decode step of a paged program as a unit: fixed inputs on the device, a choice, the inputs of the next step.

On CUDA it is captured in a graph once and replayed, so that what Python costs is paid once; elsewhere it is run as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optc.compiler.kernels.cuda.dispatch import kernels_only
from optc.compiler.ops.dialect.paged import PADDING
from optc.runtime.sessions.cuda_graphs import Launch, Recorder
from optc.runtime.sessions.row_draws import RowDraws
from optc.runtime.sessions.streaming import Draw

Run = Callable[..., Any]
"""A paged program: its inputs, flat and in the order of the contract -> its logits."""

_WARM_UPS = 2
"""Runs in front of the capture: kernels are compiled in the first, and libraries make their workspaces."""


@dataclass(frozen=True)
class RequestState:
    """Where one request stands: the token that is fed next, its position, and the blocks of the pool that it owns."""

    token: int
    position: int
    blocks: Sequence[int]


class StepState:
    """The inputs of decode steps of `batch` requests, in fixed tensors; padding at first.

    Attributes:
        ids, positions, slots: int64 [batch]. tables: int32 [batch, any]. lengths: int32 [batch].
        width: columns of the tables that the program gets: the longest request has no more blocks.
    """

    def __init__(self, batch: int, width: int, device: torch.device) -> None:
        self.batch, self.width = batch, width
        self.integers = torch.zeros((3, batch), dtype=torch.int64, device=device)
        self.integers[2] = PADDING
        self.tables = torch.zeros((batch, width), dtype=torch.int32, device=device)
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self._starts = torch.arange(batch + 1, dtype=torch.int32, device=device)
        self._rows = torch.arange(batch, device=device)

    @property
    def ids(self) -> Tensor:
        return self.integers[0]

    @property
    def positions(self) -> Tensor:
        return self.integers[1]

    @property
    def slots(self) -> Tensor:
        return self.integers[2]

    def first(self, batch: int, width: int | None = None) -> StepState:
        """The first requests, in the same memory; of tables of `width` columns, or all."""
        part = copy.copy(self)
        part.batch, part.width = batch, width or self.width
        part.integers, part.tables, part.lengths = self.integers[:, :batch], self.tables[:batch], self.lengths[:batch]
        part._starts, part._rows = self._starts[: batch + 1], self._rows[:batch]
        return part

    def inputs(self, *, selects: bool) -> list[Tensor]:
        """As the program takes them, in front of the pools."""
        found = [*self.integers, self.tables[:, : self.width], self.lengths, self._starts]
        return [*found, self._rows] if selects else found

    def advanced(self) -> tuple[Tensor, ...]:
        """As `advance_step_` takes them."""
        return self.ids, self.positions, self.slots, self.lengths, self.tables


class DecodeStep:
    """A decode step of the requests of a state, which it leaves as the next one's.

    Args:
        run: the program.
        pools: its KV pools, which it writes in place.
        selects: whether it takes `logits_indices`.
        draws: what tokens are drawn by, from the position that was fed; None takes the most likely tokens.
        chooses: False leaves choice and state to others.
        record: None where steps run as they are.

    Attributes:
        logits: [batch, V], of the last run.
        tokens: int64 [batch], the chosen ones; `NO_TOKEN` where the largest logit is not finite.
    """

    def __init__(
        self,
        run: Run,
        pools: Sequence[Tensor],
        state: StepState,
        *,
        block_size: int,
        selects: bool,
        draws: RowDraws | None = None,
        chooses: bool = True,
        record: Recorder | None,
    ) -> None:
        self.batch, self.width, self._block_size = state.batch, state.width, block_size
        self._run, self._pools, self._selects, self._chooses = run, pools, selects, chooses
        self._state, self._draws = state, draws
        self._staging: _Staging | None = None
        self._replay: Launch | None = None
        self.logits = self.tokens = torch.empty(0)
        if record is not None:
            self._capture(record)

    @property
    def recorded(self) -> bool:
        """Whether steps are replayed."""
        return self._replay is not None

    @torch.inference_mode()
    def load(
        self,
        requests: Sequence[RequestState | None],
        draws: Sequence[Draw] = (),
        rows: Sequence[Sequence[int]] = (),
    ) -> None:
        """Set the inputs of the next step; places beyond the requests, and of None, are padding.

        Args:
            draws: of a step that draws; requests beyond them are greedy.
            rows: for each of them its tokens, the one that is fed included.
        """
        assert len(requests) <= self.batch
        self._staged().load(requests, self._block_size)
        if self._draws is not None:
            self._draws.load(draws, rows)

    @torch.inference_mode()
    def set_table(self, row: int, blocks: Sequence[int]) -> None:
        """Tell of new blocks of a request, for the steps after those that were started."""
        self._staged().set_table(row, blocks)

    @torch.inference_mode()
    def run(self) -> None:
        """Start one step; the next one follows on from it."""
        (self._replay or self._compute)()

    def _staged(self) -> _Staging:
        if self._staging is None:
            self._staging = _Staging(self._state)
        return self._staging

    def _compute(self) -> None:
        state, size = self._state, self._block_size
        with kernels_only():
            output = self._run(*state.inputs(selects=self._selects), *self._pools)
            self.logits = output[0] if isinstance(output, tuple | list) else output
            if not self._chooses:
                return
            if self._draws is None:
                self.tokens = torch.ops.optc.greedy_step_(self.logits, *state.advanced(), block_size=size)
            else:
                self.tokens = self._draws.choose(self.logits, state.positions)
                torch.ops.optc.advance_step_(self.tokens, *state.advanced(), block_size=size)

    @torch.inference_mode()
    def _capture(self, record: Recorder) -> None:
        """Run the step on padding, then record it. Padding is not advanced: its inputs stay what they are."""
        written = [self._state.slots, *([] if self._draws is None else self._draws.tables)]
        before = [tensor.clone() for tensor in written]
        self._state.slots.fill_(PADDING)
        for _ in range(_WARM_UPS):
            self._compute()
        self._replay = record("a decode step", self._compute)
        for tensor, old in zip(written, before, strict=True):
            tensor.copy_(old)


class _Staging:
    """A state as the host last wrote it, in memory that the device copies from."""

    def __init__(self, state: StepState) -> None:
        self._state = state
        pinned = state.tables.device.type == "cuda"
        self._integers, self._tables, self._lengths = (
            torch.zeros_like(item, device="cpu", pin_memory=pinned)
            for item in (state.integers, state.tables, state.lengths)
        )
        self._copied = torch.cuda.Event() if pinned else None

    def load(self, requests: Sequence[RequestState | None], block_size: int) -> None:
        """All rows; see `DecodeStep.load`."""
        self._settle()
        self._integers.zero_()
        self._integers[2] = PADDING
        self._tables.zero_()
        self._lengths.zero_()
        for row, request in enumerate(requests):
            if request is None:
                continue
            block, offset = divmod(request.position, block_size)
            slot = request.blocks[block] * block_size + offset
            self._integers[:, row] = torch.tensor([request.token, request.position, slot])
            self._lengths[row] = request.position + 1
            self._stage_table(row, request.blocks)
        self._state.integers.copy_(self._integers, non_blocking=True)
        self._state.tables.copy_(self._tables, non_blocking=True)
        self._state.lengths.copy_(self._lengths, non_blocking=True)
        self._note_copies()

    def set_table(self, row: int, blocks: Sequence[int]) -> None:
        """One row's blocks."""
        self._settle()
        self._stage_table(row, blocks)
        self._state.tables[row].copy_(self._tables[row], non_blocking=True)
        self._note_copies()

    def _stage_table(self, row: int, blocks: Sequence[int]) -> None:
        assert len(blocks) <= self._state.width
        self._tables[row, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)

    def _settle(self) -> None:
        """Wait for copies out of the staged tensors, which are about to be written again."""
        if self._copied is not None:
            self._copied.synchronize()

    def _note_copies(self) -> None:
        if self._copied is not None:
            self._copied.record()
