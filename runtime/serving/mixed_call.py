"""Calls of sizes that repeat, which choose their tokens on the device: of decodes and prompts, or of decodes with drafts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from optc.compiler.execution.block_manager import StepInputs
from optc.compiler.ir.contract import OutputRole
from optc.runtime.serving.rows import Ints, Kind
from optc.runtime.serving.step_buffers import StepBuffers
from optc.runtime.sessions.paged import PagedModel
from optc.runtime.sessions.prompt_call import PromptCall

Follow = Callable[[StepInputs, Mapping[OutputRole, Tensor]], None]
"""What is done in a call with the tokens behind those that were fed, at the same places, and with the outputs beside the
logits."""


class MixedCall:
    """A call of decodes and prompts of a size that repeats; tokens are chosen in it, but for `Kind.OPEN`, whose logits it
    gives.

    A negative token -1 - r is the one that the device has for row r.

    Args:
        size: tokens and requests.
        every: each token is a request of its own, and the one request to spare is empty or padding: one of drafted tokens
            has the blocks of the row that it is drafted for, one position behind the token before it. Keys and values
            are written before any is attended to, since there are more requests than tokens (`attention.launch`).
        follow: see `Follow`.
    """

    def __init__(
        self,
        model: PagedModel,
        buffers: StepBuffers,
        size: tuple[int, int],
        kind: Kind,
        *,
        every: bool = False,
        follow: Follow | None = None,
    ) -> None:
        tokens, requests = size
        assert not every or requests == tokens + 1
        self._every, self._follow = every, follow
        self._model, self._buffers = model, buffers
        self._draws = buffers.draws(kind) if kind < Kind.OPEN else None
        self._chooses = kind < Kind.OPEN
        self._rows = torch.full((requests,), buffers.nobody, dtype=torch.int64, device=model.device)
        self._behind = torch.zeros(tokens, dtype=torch.int64, device=model.device)
        self._call = PromptCall(
            self._compute,
            model.pools,
            tokens=tokens,
            requests=requests,
            width=buffers.state.width,
            record=model.record if tokens <= model.prompt_tokens else None,
        )

    @property
    def recorded(self) -> bool:
        return self._call.recorded

    def __call__(self, inputs: StepInputs, rows: Ints, behind: Ints | None = None) -> Tensor:
        """Tokens of the requests, [R], which are the rows' from then on (but for `every`), or logits [R, V].

        Args:
            rows: [R], whose they are.
            behind: [N], for `follow`: the token behind each that is fed; -1 - r is the one that request r gets.
        """
        if behind is not None:
            padded = np.zeros(len(self._behind), np.int64)
            padded[: len(behind)] = behind
            self._behind.copy_(self._buffers.send(padded), non_blocking=True)
        if self._draws is not None or not self._every:
            padded = np.full(len(self._rows), self._buffers.nobody, np.int64)
            padded[: len(rows)] = rows
            self._rows.copy_(self._buffers.send(padded), non_blocking=True)
        found = self._call(inputs)
        if self._chooses and not self._every:  # not in the call, which gives the same when it runs twice
            self._buffers.state.ids.index_copy_(0, self._rows[: len(rows)], found.clamp(min=0))
        return found

    def _compute(self, ids: Tensor, positions: Tensor, *rest: Any) -> Tensor:
        tables, wanted, pools = rest[:4], rest[4], rest[5:]
        own = self._buffers.state.ids
        known = torch.where(ids < 0, own.index_select(0, (-1 - ids).clamp(min=0)), ids)
        wanted = wanted[: len(ids)]
        selected = (wanted,) if self._model.selects else ()
        run = (self._model.step or self._model.run) if self._every else self._model.run
        logits, others = self._model.parts(run(known, positions, *tables, *selected, *pools))
        if not (self._every or self._model.selects):
            logits = logits.index_select(0, wanted)
        found = self._choose(logits, positions, wanted)
        if self._follow is not None:
            chosen = found if self._chooses else torch.ops.optc.argmax(logits)
            got = chosen.clamp(min=0).index_select(0, (-1 - self._behind).clamp(min=0))
            behind = torch.where(self._behind < 0, got, self._behind)
            self._follow(StepInputs(behind, positions, *tables), others)
        return found

    def _choose(self, logits: Tensor, positions: Tensor, wanted: Tensor) -> Tensor:
        if not self._chooses:
            return logits
        if self._draws is None:
            found: Tensor = torch.ops.optc.argmax(logits)
            return found
        return self._draws.of(self._rows[: len(wanted)]).choose(logits, positions.index_select(0, wanted))
