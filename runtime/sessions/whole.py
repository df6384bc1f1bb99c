"""Session over a graph without a KV cache: each call computes the whole row anew.

It is for decoders whose tokens mix in ways that no cache of keys and values holds. A step costs what a prompt of all tokens
so far does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from optc.compiler.diagnostics import TargetError
from optc.compiler.ir.contract import Contract
from optc.runtime.sessions.session import Logits, Rows, Session, other_graph

_FED = {"input_ids", "position_ids", "attention_mask"}


class WholeSession(Session):
    """A decoder that is given all tokens of a row at once; rows run one after the other, without padding.

    Args:
        call: the graph as a function of arrays, in the order of the contract's inputs.
        contract: its contract, of kv_cache kind "none".

    Raises:
        TargetError: the graph takes more than tokens, their positions and a mask.
        ArtifactError: the contract is of no language model.
    """

    def __init__(self, call: Callable[..., list[Any]], contract: Contract) -> None:
        assert contract.kv_cache.kind == "none"
        more = [spec.name for spec in contract.inputs if spec.role not in _FED]
        if more:
            raise TargetError(
                "the artifact takes more than tokens",
                why=f"it reads {', '.join(more)}",
                remedy="call it with tensors: optc run --inputs FILE.npz",
            )
        if contract.model.vocab_size < 1:
            raise other_graph("manifest.json", f"{contract.model.vocab_size} tokens")
        super().__init__(vocab_size=contract.model.vocab_size, context_length=contract.model.context_length)
        self._call, self._contract = call, contract
        self._rows: list[list[int]] = []

    def close(self) -> None:
        self._rows = []

    # -- Session ----------------------------------------------------------------------------

    def _start(self, batch: int) -> None:
        self._rows = [[] for _ in range(batch)]
        self.lengths = [0] * batch

    def _advance(self, rows: Rows) -> Logits:
        logits: Logits = np.stack([self._append(index, row)[-1] for index, row in enumerate(rows)])
        return logits

    def _score(self, tokens: Sequence[int]) -> Logits:
        return self._append(0, tokens)[-len(tokens) :]

    def _rewind(self, lengths: Sequence[int]) -> None:
        for row, length in zip(self._rows, lengths, strict=True):
            del row[length:]

    def _append(self, index: int, tokens: Sequence[int]) -> Logits:
        """The logits [n, V] of a row with these tokens behind it."""
        row = [*self._rows[index], *tokens]
        ids = np.array([row], np.int64)
        made = {
            "input_ids": ids,
            "position_ids": np.arange(len(row), dtype=np.int64)[None],
            "attention_mask": np.ones_like(ids),
        }
        outputs = self._call(*(made[spec.role] for spec in self._contract.inputs))
        if outputs[0].shape != (1, len(row), self.vocab_size):
            raise other_graph(
                "manifest.json", f"logits {list(outputs[0].shape)} of {len(row)} tokens, with {self.vocab_size} in all"
            )
        self._rows[index] = row
        self.lengths[index] = len(row)
        logits: Logits = outputs[0][0].astype(np.float32, copy=False)
        return logits
