"""Sessions over Programs, run eagerly: no compiler between the graph and its numbers. Slow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from optc.compiler.diagnostics import TargetError
from optc.compiler.ir.devices import program_device
from optc.compiler.ir.program import Program
from optc.runtime.sessions.paged import PagedSession
from optc.runtime.sessions.session import Logits, Rows, Session
from optc.runtime.sessions.torch_linear import TorchSession, to_logits


class RecomputeSession(Session):
    """A decoder without a cache: every call runs the whole sequence of each row again."""

    def __init__(self, program: Program) -> None:
        facts = program.contract.model
        super().__init__(vocab_size=facts.vocab_size, context_length=facts.context_length)
        self._program, self._device = program, program_device(program)
        self._rows: list[list[int]] = []

    def close(self) -> None:
        self._rows = []

    def _start(self, batch: int) -> None:
        self._rows = [[] for _ in range(batch)]

    def _advance(self, rows: Rows) -> Logits:
        for held, new in zip(self._rows, rows, strict=True):
            held.extend(new)
        self.lengths = [len(row) for row in self._rows]
        return np.stack([self._forward(row)[-1] for row in self._rows])

    def _score(self, tokens: Sequence[int]) -> Logits:
        self._rows[0].extend(tokens)
        self.lengths = [len(self._rows[0])]
        return self._forward(self._rows[0])[-len(tokens) :]

    def _rewind(self, lengths: Sequence[int]) -> None:
        for row, length in zip(self._rows, lengths, strict=True):
            del row[length:]

    def _forward(self, tokens: Sequence[int]) -> Logits:
        ids = torch.tensor([tokens], device=self._device)
        places = torch.arange(len(tokens), device=self._device)[None]
        return to_logits(self._program(ids, places)[0].cpu())


def open_program(program: Program, *, num_blocks: int = 256) -> Session:
    """A session over a decoder Program at any stage, picked by its kind of KV cache.

    Args:
        num_blocks: size of the pools of a paged Program.

    Raises:
        TargetError: the Program is not a decoder.
    """
    contract = program.contract
    if contract.kind != "decoder":
        raise TargetError(f"a program of kind '{contract.kind}' does not generate", remedy="call it directly")
    if contract.kv_cache.kind == "none":
        return RecomputeSession(program)
    if contract.kv_cache.kind == "linear":
        return TorchSession(program, contract)
    return PagedSession(program, contract, num_blocks=num_blocks)
