"""Sessions over graphs with a linear KV cache: which rows run together, and how the cache grows.

Graphs of this kind take `input_ids` [b, S], `attention_mask` [b, T] and caches [b, Hkv, capacity, D].
Only the row sums of the mask count: row r holds `total[r]` tokens after the run, so its new ones
start at `max(total[r] - S, 0)`. A batch can therefore run together when all of it is new (rows
padded on the right) or when every row gets one token; rows that continue by chunks run one by one,
on views of their part of the cache (GroupQueryAttention of ONNX Runtime demands it as well).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from optc.compiler.ir.contract import STATE_ROLE, Contract, Input
from optc.runtime.sessions.session import Logits, Rows, Session

Ids = npt.NDArray[np.int64]

_FIRST_CAPACITY = 256
_CACHE_LINE = 64


class LinearSession(Session):
    """Batching policy and cache capacity; an engine says how to run and how to allocate."""

    def __init__(self, contract: Contract) -> None:
        super().__init__(vocab_size=contract.model.vocab_size, context_length=contract.model.context_length)
        self.keeps_states = contract.keeps_states
        self.capacity = 0
        self._batch = 0

    @abstractmethod
    def _allocate(self, batch: int, capacity: int, keep: int) -> None:
        """Caches for `batch` rows of `capacity` tokens, with the first `keep` tokens of the present ones."""

    @abstractmethod
    def _run(self, ids: Ids, mask: Ids, rows: slice) -> Logits:
        """Run ids [b, S] and mask [b, T] on the caches of these rows; logits [b, S, V], or [b, 1, V] of each row's last token.

        The result may be a view that the next run overwrites.
        """

    def _run_all(self, ids: Ids, mask: Ids, rows: slice) -> Logits:
        """As `_run`, of every token."""
        return self._run(ids, mask, rows)

    # -- Session ----------------------------------------------------------------------------

    def _start(self, batch: int) -> None:
        if batch != self._batch:
            self._batch, self.capacity = batch, 0
        self.lengths = [0] * batch

    def _advance(self, rows: Rows) -> Logits:
        longest = max(map(len, rows))
        self._reserve(max(n + len(row) for n, row in zip(self.lengths, rows, strict=True)))
        together = longest == 1 or not any(self.lengths)
        if together and len(rows) * longest <= self.chunk:
            return self._together(rows, longest)
        logits: Logits = np.concatenate([self._row(index, row) for index, row in enumerate(rows)])
        return logits

    def _decode_running(self, tokens: Sequence[int | None]) -> Logits:
        if not self.keeps_states:
            return super()._decode_running(tokens)
        logits = np.zeros((len(tokens), self.vocab_size), np.float32)
        for index, token in enumerate(tokens):
            if token is not None:
                self._reserve(self.lengths[index] + 1)
                logits[index] = self._row(index, [token])
        return logits

    def _score(self, tokens: Sequence[int]) -> Logits:
        self._reserve(self.lengths[0] + len(tokens))
        logits: Logits = self._chunk(0, tokens, self._run_all)[0].copy()
        return logits

    # -- runs -------------------------------------------------------------------------------

    def _together(self, rows: Rows, longest: int) -> Logits:
        ids = np.zeros((len(rows), longest), np.int64)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = row
        totals = [n + len(row) for n, row in zip(self.lengths, rows, strict=True)]
        logits = self._run(ids, ones_to(totals), slice(0, len(rows)))
        self.lengths = totals
        last = [len(row) - 1 if logits.shape[1] == longest else 0 for row in rows]
        chosen: Logits = logits[np.arange(len(rows)), last]
        return chosen

    def _row(self, index: int, tokens: Sequence[int]) -> Logits:
        for start in range(0, len(tokens), self.chunk):
            logits = self._chunk(index, tokens[start : start + self.chunk], self._run)
        last: Logits = logits[:, -1].copy()
        return last

    def _chunk(self, index: int, tokens: Sequence[int], run: Callable[[Ids, Ids, slice], Logits]) -> Logits:
        total = self.lengths[index] + len(tokens)
        logits = run(np.array([tokens], np.int64), ones_to([total]), slice(index, index + 1))
        self.lengths[index] = total
        return logits

    def _reserve(self, tokens: int) -> None:
        """Room for `tokens` per row: doubling, up to the context."""
        if tokens <= self.capacity:
            return
        capacity = max(_FIRST_CAPACITY, 1 << (tokens - 1).bit_length())
        keep = max(self.lengths) if self.capacity else 0
        self._allocate(self._batch, min(capacity, self.context_length), keep)
        self.capacity = min(capacity, self.context_length)


def ones_to(totals: Sequence[int]) -> Ids:
    """mask[b, t] = 1 for t < totals[b], of width max(totals)."""
    return (np.arange(max(totals)) < np.array(totals)[:, None]).astype(np.int64)


def held_shape(spec: Input, batch: int, capacity: int) -> tuple[int, ...]:
    """The shape of a cache or a state for `batch` rows of at most `capacity` tokens."""
    sizes = (batch, *(capacity if isinstance(size, str) else size for size in spec.dims[1:]))
    assert spec.role == STATE_ROLE or len(sizes) == 4
    return sizes


def lazy_zeros(shape: Sequence[int], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Zeros that begin on a cache line and take memory when first written."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(size + _CACHE_LINE, np.uint8)
    start = -raw.ctypes.data % _CACHE_LINE
    return raw[start : start + size].view(dtype).reshape(shape)
