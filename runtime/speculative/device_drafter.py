"""Drafts that are made on the device, in the captured call that verifies those before them.

Of EAGLE-3 (Li et al. 2025, https://arxiv.org/abs/2503.01840) the draft model's layer has pools of its own that share blocks
and tables with the base's, as one more layer of it would: what is found in the base's pool, given back or computed again is
so for both. At position i it is fed the token behind it, whose keys it therefore holds in slot i; of the last token of a
block that requests share, that was the token of whichever request computed it.

Of Medusa (Cai et al. 2024, https://arxiv.org/abs/2401.10774) the base gives the likeliest tokens of its heads itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from optc.compiler.diagnostics import TargetError
from optc.compiler.execution.block_manager import StepInputs
from optc.compiler.ir.contract import OutputRole
from optc.runtime.sessions.draft_graphs import DraftGraphs

ROLE: OutputRole = "aux_hidden"
"""The output of the base that EAGLE-3 reads."""


@dataclass(frozen=True, kw_only=True)
class Verified:
    """What is known on the device behind a round's verification.

    Attributes:
        inputs: of the round's tokens, requests one behind the other, each token by itself; but with the token behind it.
        outputs: of the base at these tokens, beside the logits.
        picks: int64 [B], of each request the token behind which it goes on.
        further: of the positions behind that one, one after the other, inputs of all requests; what they hold for ids is
            of no meaning.
    """

    inputs: StepInputs
    outputs: Mapping[OutputRole, Tensor]
    picks: Tensor
    further: list[StepInputs]


@runtime_checkable
class DeviceDrafter(Protocol):
    """What it does is captured: shapes alone decide what is launched."""

    def follow(self, inputs: StepInputs, outputs: Mapping[OutputRole, Tensor]) -> None:
        """Take what a call of prompts and decodes gave, at the tokens that it was fed.

        Args:
            inputs: of the call; but of each token the one behind it. outputs: of the base, beside the logits.
        """

    def draft(self, verified: Verified, drafts: Tensor, count: int) -> None:
        """Draft behind the tokens that are verified now, into the first `count` columns of drafts int64 [B or more, any].

        As many positions are there to go on from, but one.
        """

    def close(self) -> None: ...


class Eagle3OnDevice:
    """See above.

    Args:
        pools: keys and values of the layer, in blocks as the base's.
        widths: of its inputs `base_states` and `own_states`. dtype: theirs.
    """

    def __init__(
        self,
        graphs: DraftGraphs,
        pools: list[Tensor],
        widths: tuple[int, int],
        dtype: torch.dtype,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self._graphs, self._pools, self._on_close = graphs, pools, on_close
        self._nothing = [torch.zeros((1, width), dtype=dtype, device=pools[0].device) for width in widths]
        self._dtype = dtype

    def follow(self, inputs: StepInputs, outputs: Mapping[OutputRole, Tensor]) -> None:
        """See `DeviceDrafter`."""
        rows = len(inputs.input_ids)
        self._graphs.keys(*inputs, self._read(outputs, rows), self._none(1, rows), *self._pools)

    def draft(self, verified: Verified, drafts: Tensor, count: int) -> None:
        """See `DeviceDrafter`."""
        inputs, outputs = verified.inputs, verified.outputs
        if not count:
            self.follow(inputs, outputs)
            return
        rows = len(inputs.input_ids)
        states = (self._read(outputs, rows), self._none(1, rows))
        logits, state = self._graphs.first(*inputs, *states, *self._pools, verified.picks)
        token = torch.ops.optc.choose_draft_(logits, self._graphs.targets, drafts, place=0)
        for place, inputs in enumerate(verified.further[: count - 1], 1):
            fed = inputs._replace(input_ids=token)
            logits, state = self._graphs.further(*fed, self._none(0, len(token)), state, *self._pools)
            token = torch.ops.optc.choose_draft_(logits, self._graphs.targets, drafts, place=place)

    def close(self) -> None:
        """See `DeviceDrafter`."""
        self._pools.clear()
        self._on_close()

    def _read(self, outputs: Mapping[OutputRole, Tensor], rows: int) -> Tensor:
        """The base's states, of all tokens of a call.

        Raises:
            TargetError: the program gives those of selected tokens.
        """
        states = outputs[ROLE]
        if len(states) != rows:
            raise TargetError(
                "the artifact gives the hidden states of some tokens only",
                why="it was compiled by an earlier version of optc",
                remedy="compile the model that verifies again",
            )
        return states.to(self._dtype)

    def _none(self, which: int, rows: int) -> Tensor:
        """States that the graph does not read."""
        return self._nothing[which].expand(rows, -1)


class MedusaOnDevice:
    """See above."""

    def follow(self, inputs: StepInputs, outputs: Mapping[OutputRole, Tensor]) -> None:
        """Nothing: heads have no cache."""

    def draft(self, verified: Verified, drafts: Tensor, count: int) -> None:
        """See `DeviceDrafter`."""
        guessed = verified.outputs["drafted"].index_select(0, verified.picks)[:, :count]
        drafts[: len(guessed), :count] = guessed

    def close(self) -> None:
        """Nothing is open."""
