"""One decode step of a paged program as a unit: fixed inputs on the device, a choice, the inputs of the next step.

On CUDA it is captured in a graph once and replayed, so that what Python costs is paid once; elsewhere it is run as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optc.compiler.kernels.cuda.dispatch import kernels_only
from optc.compiler.ops.dialect.paged import PADDING
from optc.runtime.sessions.cuda_graphs import Launch, Recorder
from optc.runtime.sessions.row_draws import RowDraws
from optc.runtime.sessions.streaming import Choice, Draw

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


class DecodeStep:
    """A decode step of `batch` requests with block tables of `width` columns.

    Args:
        run: the program.
        pools: its KV pools, which it writes in place.
        selects: whether it takes `logits_indices`.
        choice: "greedy" takes the most likely tokens. Otherwise they are drawn, row by row as `load` says, from the seed
            and the position that was fed; "penalized" has tables of what rows hold as well.
        vocabulary: V.
        record: None where steps run as they are.

    Attributes:
        logits: [batch, V], of the last run.
        tokens: int64 [batch], the chosen ones; `NO_TOKEN` where the largest logit is not finite.
    """

    def __init__(
        self,
        run: Run,
        pools: Sequence[Tensor],
        *,
        batch: int,
        width: int,
        block_size: int,
        selects: bool,
        choice: Choice,
        vocabulary: int,
        record: Recorder | None,
    ) -> None:
        device = pools[0].device
        self.batch, self.width, self._block_size = batch, width, block_size
        self._run, self._pools, self._selects = run, pools, selects
        self._integers = torch.zeros((3, batch), dtype=torch.int64, device=device)
        self._tables = torch.zeros((batch, width), dtype=torch.int32, device=device)
        self._lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self._starts = torch.arange(batch + 1, dtype=torch.int32, device=device)
        self._rows = torch.arange(batch, device=device)
        tables = vocabulary if choice == "penalized" else None
        self._draws = None if choice == "greedy" else RowDraws(batch, device, tables)
        pinned = device.type == "cuda"
        self._staged, self._staged_tables, self._staged_lengths = (
            torch.zeros_like(item, device="cpu", pin_memory=pinned)
            for item in (self._integers, self._tables, self._lengths)
        )
        self._copied = torch.cuda.Event() if pinned else None
        self._replay: Launch | None = None
        self.logits = self.tokens = torch.empty(0)
        self.load([])
        if record is not None:
            self._capture(record)

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
        self._settle()
        self._staged.zero_()
        self._staged[2] = PADDING
        self._staged_tables.zero_()
        self._staged_lengths.zero_()
        for row, state in enumerate(requests):
            if state is None:
                continue
            block, offset = divmod(state.position, self._block_size)
            slot = state.blocks[block] * self._block_size + offset
            self._staged[:, row] = torch.tensor([state.token, state.position, slot])
            self._staged_lengths[row] = state.position + 1
            self._stage_table(row, state.blocks)
        self._integers.copy_(self._staged, non_blocking=True)
        self._tables.copy_(self._staged_tables, non_blocking=True)
        self._lengths.copy_(self._staged_lengths, non_blocking=True)
        self._note_copies()
        if self._draws is not None:
            self._draws.load(draws, rows)

    @torch.inference_mode()
    def set_table(self, row: int, blocks: Sequence[int]) -> None:
        """Tell of new blocks of a request, for the steps after those that were started."""
        self._settle()
        self._stage_table(row, blocks)
        self._tables[row].copy_(self._staged_tables[row], non_blocking=True)
        self._note_copies()

    @torch.inference_mode()
    def run(self) -> None:
        """Start one step; the next one follows on from it."""
        (self._replay or self._compute)()

    def _stage_table(self, row: int, blocks: Sequence[int]) -> None:
        assert len(blocks) <= self.width
        self._staged_tables[row, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)

    def _settle(self) -> None:
        """Wait for copies out of the staged tensors, which are about to be written again."""
        if self._copied is not None:
            self._copied.synchronize()

    def _note_copies(self) -> None:
        if self._copied is not None:
            self._copied.record()

    def _compute(self) -> None:
        ids, positions, slots = self._integers
        inputs = [ids, positions, slots, self._tables, self._lengths, self._starts]
        chosen = [self._rows] if self._selects else []
        state, size = (ids, positions, slots, self._lengths, self._tables), self._block_size
        with kernels_only():
            output = self._run(*inputs, *chosen, *self._pools)
            self.logits = output[0] if isinstance(output, tuple | list) else output
            if self._draws is None:
                self.tokens = torch.ops.optc.greedy_step_(self.logits, *state, block_size=size)
            else:
                self.tokens = self._draws.choose(self.logits, positions)
                torch.ops.optc.advance_step_(self.tokens, *state, block_size=size)

    @torch.inference_mode()
    def _capture(self, record: Recorder) -> None:
        """Run the step on padding, then record it. Padding is not advanced: its inputs stay what they are."""
        for _ in range(_WARM_UPS):
            self._compute()
        self._replay = record("a decode step", self._compute)
