"""A round of drafts as a unit: what was drafted is verified and kept as far as it is right, and the next tokens are drafted.

Fixed tensors on the device, which a round leaves as the next one's: rounds follow each other without the host. On CUDA a
round is captured in a graph, as `DecodeStep` is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optc.compiler.execution.block_manager import StepInputs
from optc.compiler.kernels.cuda.dispatch import kernels_only
from optc.runtime.sessions.cuda_graphs import Launch
from optc.runtime.sessions.decode_step import StepState
from optc.runtime.sessions.paged import PagedModel
from optc.runtime.sessions.row_draws import RowDraws
from optc.runtime.speculative.device_drafter import DeviceDrafter, Verified

_WARM_UPS = 2
"""Runs in front of the capture, as of decode steps."""


class Round:
    """A round of the first requests of a state.

    Args:
        state: whose tables are read; of as many requests as a round has.
        drafts: int64 [requests or more, depth or more], see `lay_out_drafts_`.
        depth: tokens that are verified and drafted; with 0 the round is a plain step that the drafter follows.
        draws: what tokens are drawn by; None takes the likeliest.

    Attributes:
        outcome: int64 [requests, depth + 3], see `accept_drafts_`.
    """

    def __init__(
        self,
        model: PagedModel,
        drafter: DeviceDrafter,
        state: StepState,
        drafts: Tensor,
        depth: int,
        draws: RowDraws | None,
    ) -> None:
        device, self.batch, self.depth = model.device, state.batch, depth
        self._model, self._drafter, self._drafts, self._draws = model, drafter, drafts, draws
        self._tables = state.tables[:, : state.width]
        tokens = self.batch * (depth + 1)
        requests = tokens + (depth > 0)  # one more: keys and values are written before any is attended to
        self._heads = torch.zeros((4, self.batch), dtype=torch.int64, device=device)
        self._owner = torch.arange(requests, device=device).div(depth + 1, rounding_mode="floor")
        self._owner.clamp_(max=self.batch - 1)
        starts = torch.arange(requests + 1, dtype=torch.int32, device=device).clamp(max=tokens)
        ids, positions, slots = torch.zeros((3, tokens), dtype=torch.int64, device=device)
        self._inputs = StepInputs(
            ids,
            positions,
            slots,
            torch.zeros((requests, state.width), dtype=torch.int32, device=device),
            torch.zeros(requests, dtype=torch.int32, device=device),
            starts,
        )
        self._every = torch.arange(tokens, device=device)
        self._picks = torch.zeros(self.batch, dtype=torch.int64, device=device)
        further = max(0, depth - 1)
        self._further = torch.zeros((2, further, self.batch), dtype=torch.int64, device=device)
        self._lengths = torch.zeros((further, self.batch), dtype=torch.int32, device=device)
        self._alone = torch.arange(self.batch + 1, dtype=torch.int32, device=device)
        self._replay: Launch | None = None
        self.outcome = torch.empty(0)
        if model.record is not None:
            self._capture(model)

    @property
    def recorded(self) -> bool:
        return self._replay is not None

    @torch.inference_mode()
    def load(self, heads: Tensor) -> None:
        """Where requests stand, int64 [4, B], see `compiler/ops/dialect/drafts`; and their tables as they are now."""
        self._heads.copy_(heads, non_blocking=True)
        self._take_tables()

    @torch.inference_mode()
    def extend(self, limits: Tensor) -> None:
        """Requests go on from where they are, with other limits, int64 [B], and tables as they are now."""
        self._heads[2].copy_(limits, non_blocking=True)
        self._take_tables()

    def _take_tables(self) -> None:
        torch.index_select(self._tables, 0, self._owner, out=self._inputs.block_tables)

    @torch.inference_mode()
    def run(self) -> None:
        """Start one round; the next one follows on from it."""
        (self._replay or self._compute)()

    def _compute(self) -> None:
        model, inputs, size = self._model, self._inputs, self._model.block_size
        ids, positions, slots, tables, lengths, starts = inputs
        with kernels_only():
            torch.ops.optc.lay_out_drafts_(
                self._heads, self._drafts, self._tables, ids, positions, slots, lengths, block_size=size
            )
            selected = (self._every,) if model.selects else ()
            logits, outputs = model.parts((model.step or model.run)(*inputs, *selected, *model.pools))
            self.outcome, behind = torch.ops.optc.accept_drafts_(
                self._decided(logits),
                self._heads,
                self._drafts,
                self._tables,
                self._picks,
                *self._further,
                self._lengths,
                block_size=size,
                made=self.depth,
            )
            verified = Verified(
                inputs=StepInputs(behind, positions, slots, tables, lengths, starts),
                outputs=outputs,
                picks=self._picks,
                further=self._further_inputs(),
            )
            self._drafter.draft(verified, self._drafts, self.depth)

    def _decided(self, logits: Tensor) -> Tensor:
        if self._draws is None:
            found: Tensor = torch.ops.optc.argmax(logits)
            return found
        owner = self._owner[: len(self._every)]
        return self._draws.of(owner).choose(logits, self._inputs.position_ids)

    def _further_inputs(self) -> list[StepInputs]:
        positions, slots = self._further
        return [
            StepInputs(self._picks, positions[place], slots[place], self._tables, self._lengths[place], self._alone)
            for place in range(len(positions))
        ]

    @torch.inference_mode()
    def _capture(self, model: PagedModel) -> None:
        """Run the round on padding, then record it: nothing has a slot, and drafts are put back."""
        assert model.record is not None
        before = self._drafts.clone()
        for _ in range(_WARM_UPS):
            self._compute()
        self._replay = model.record("a round of drafts", self._compute)
        self._drafts.copy_(before)
