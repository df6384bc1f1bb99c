"""A call of decodes and prompts of a size that repeats, which chooses its tokens on the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from optc.compiler.execution.block_manager import StepInputs
from optc.runtime.serving.rows import Ints, Kind
from optc.runtime.serving.step_buffers import StepBuffers
from optc.runtime.sessions.paged import PagedModel
from optc.runtime.sessions.prompt_call import PromptCall


class MixedCall:
    """A call of decodes and prompts of a size that repeats; tokens are chosen in it, but for `Kind.OPEN`, whose logits it
    gives.

    A negative token -1 - r is the one that the device has for row r.
    """

    def __init__(self, model: PagedModel, buffers: StepBuffers, size: tuple[int, int], kind: Kind) -> None:
        tokens, requests = size
        self._model, self._buffers = model, buffers
        self._draws = buffers.draws(kind) if kind < Kind.OPEN else None
        self._chooses = kind < Kind.OPEN
        self._rows = torch.full((requests,), buffers.nobody, dtype=torch.int64, device=model.device)
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

    def __call__(self, inputs: StepInputs, rows: Ints) -> Tensor:
        """Tokens of the requests, [R], which are the rows' from then on, or logits [R, V]; `rows` [R] says whose."""
        padded = np.full(len(self._rows), self._buffers.nobody, np.int64)
        padded[: len(rows)] = rows
        self._rows.copy_(self._buffers.send(padded), non_blocking=True)
        found = self._call(inputs)
        if self._chooses:  # not in the call, which gives the same when it runs twice
            self._buffers.state.ids.index_copy_(0, self._rows[: len(rows)], found.clamp(min=0))
        return found

    def _compute(self, ids: Tensor, positions: Tensor, *rest: Any) -> Tensor:
        tables, wanted, pools = rest[:4], rest[4], rest[5:]
        own = self._buffers.state.ids
        known = torch.where(ids < 0, own.index_select(0, (-1 - ids).clamp(min=0)), ids)
        selected = (wanted,) if self._model.selects else ()
        outputs = self._model.run(known, positions, *tables, *selected, *pools)
        logits: Tensor = outputs[0] if isinstance(outputs, tuple | list) else outputs
        logits = logits if self._model.selects else logits.index_select(0, wanted)
        if not self._chooses:
            return logits
        if self._draws is None:
            return torch.ops.optc.argmax(logits)
        return self._draws.of(self._rows).choose(logits, positions.index_select(0, wanted))
