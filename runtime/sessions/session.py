"""Session: one small interface over every engine that runs an artifact.

A session holds a batch of rows, each with its own KV cache. Logits are NumPy float32 arrays that the
caller owns. B is the batch, V the vocabulary.
"""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
import psutil

from optc.compiler.diagnostics import ArtifactError, GateError, InputError, TargetError, UsageError

Logits = npt.NDArray[np.float32]
Rows = Sequence[Sequence[int]]

LOGITS_BYTES = 1 << 28
"""Most bytes of logits that one run of the graph may produce; longer prompts go in chunks."""

UNKNOWN_CONTEXT = 1 << 20
"""The context of a model whose config names none."""


@dataclass(frozen=True, kw_only=True)
class SessionOptions:
    """How a session is opened.

    Attributes:
        threads: of the engine; None takes one per physical core that this process may use.
        num_blocks: size of the KV pool of a paged artifact; see `PagedSession`.
        device: where a graph without an engine is run: cpu, cuda, cuda:N or auto.
    """

    threads: int | None = None
    num_blocks: int | None = None
    device: str = "cpu"


class Session(ABC):
    """A batch of sequences on one engine.

    Attributes:
        vocab_size: V.
        context_length: most tokens a row may hold.
        lengths: tokens in the cache of each row; read-only, change it by `rewind`.
        keeps_states: rows have states of recurrent layers, which are those behind all of a row's tokens.
    """

    keeps_states = False

    def __init__(self, *, vocab_size: int, context_length: int) -> None:
        assert vocab_size > 0
        self.vocab_size = vocab_size
        self.context_length = context_length or UNKNOWN_CONTEXT
        self.lengths: list[int] = []

    @property
    def chunk(self) -> int:
        """Most tokens per run of the graph, from `LOGITS_BYTES`."""
        return max(1, LOGITS_BYTES // (4 * self.vocab_size))

    def continued(self, prompts: Rows) -> Rows:
        """What the generated tokens of each prompt continue: the prompts themselves."""
        return prompts

    def prefill(self, prompts: Rows) -> Logits:
        """Start over with these prompts; logits [B, V] of the last token of each.

        Raises:
            InputError: no prompt, an empty one, a token outside the vocabulary, or one longer than
                the context.
        """
        if not prompts:
            raise InputError("there is no prompt", remedy="give at least one prompt")
        self._check(prompts, [0] * len(prompts))
        self._start(len(prompts))
        self.lengths = [0] * len(prompts)
        return self._advance(prompts)

    def extend(self, rows: Rows) -> Logits:
        """Append tokens to every row (chunked prefill, a next turn); logits [B, V] of the last of each.

        Raises:
            InputError: as `prefill`; the cache is unchanged then.
        """
        self._check_batch(len(rows))
        self._check(rows, self.lengths)
        return self._advance(rows)

    def decode(self, tokens: Sequence[int]) -> Logits:
        """Append one token to every row; logits [B, V].

        Raises:
            InputError: a token outside the vocabulary, or a row whose context is full.
        """
        self._check_batch(len(tokens))
        if min(tokens) < 0 or max(tokens) >= self.vocab_size or max(self.lengths) >= self.context_length:
            self._check([[token] for token in tokens], self.lengths)
        return self._decode(tokens)

    def decode_running(self, tokens: Sequence[int | None]) -> Logits:
        """As `decode` for some rows alone: a row of None stays as it was, and its logits mean nothing.

        Raises:
            InputError: as `decode`.
        """
        self._check_batch(len(tokens))
        running = [row for row, token in enumerate(tokens) if token is not None]
        self._check([[token] for token in tokens if token is not None], [self.lengths[row] for row in running])
        return self._decode_running(tokens)

    def rewind(self, lengths: Sequence[int]) -> None:
        """Forget the end of each row: keep its first `lengths[b]` tokens.

        Raises:
            UsageError: a length outside 0..current.
            TargetError: a length between, of a model whose layers keep states.
        """
        self._check_batch(len(lengths))
        for row, (wanted, held) in enumerate(zip(lengths, self.lengths, strict=True)):
            if not 0 <= wanted <= held:
                raise UsageError(
                    f"cannot rewind row {row} to {wanted} tokens",
                    why=f"it holds {held}",
                    remedy="rewind to a length that the row has had",
                )
            if self.keeps_states and 0 < wanted < held:
                raise TargetError(
                    f"cannot rewind row {row} from {held} to {wanted} tokens",
                    why="the model's recurrent layers keep one state per row, that behind its last token",
                    remedy="rewind to 0, and feed the tokens again",
                )
        self._rewind(lengths)
        self.lengths = list(lengths)

    def score(self, tokens: Sequence[int]) -> Iterator[Logits]:
        """Start over with one row and yield the logits [n, V] of all its tokens, chunk after chunk.

        Raises:
            InputError: as `prefill`.
        """
        self._check([tokens], [0])
        self._start(1)
        self.lengths = [0]
        for start in range(0, len(tokens), self.chunk):
            yield self._score(tokens[start : start + self.chunk])

    @property
    def warm_up_calls(self) -> int:
        """Calls of a size before those that take as long as all later ones."""
        return 1

    @property
    def device_name(self) -> str:
        """The device that computes; "" where it is the processor."""
        return ""

    def read_bandwidth(self) -> float | None:
        """Bytes per second that the device's memory is read at, measured now; None where it is the processor's."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Give the engine and its memory back; the session cannot be used after this."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- for engines ------------------------------------------------------------------------
    # Each of these keeps `lengths` true.

    @abstractmethod
    def _start(self, batch: int) -> None:
        """Empty caches for `batch` rows."""

    @abstractmethod
    def _advance(self, rows: Rows) -> Logits:
        """Checked `extend`."""

    @abstractmethod
    def _score(self, tokens: Sequence[int]) -> Logits:
        """Append at most `chunk` tokens to the only row; all their logits [n, V]."""

    def _decode(self, tokens: Sequence[int]) -> Logits:
        """Checked `decode`."""
        return self._advance([[token] for token in tokens])

    def _decode_running(self, tokens: Sequence[int | None]) -> Logits:
        """Checked `decode_running`. Rows that stay are fed a filler, and taken back."""
        room = self.context_length - 1
        kept = [min(n, room) if token is None else n for n, token in zip(self.lengths, tokens, strict=True)]
        self.rewind(kept)
        logits = self.decode([0 if token is None else token for token in tokens])
        self.rewind([n if token is None else n + 1 for n, token in zip(kept, tokens, strict=True)])
        return logits

    def _rewind(self, lengths: Sequence[int]) -> None:
        """Called before `lengths` shrinks. Linear caches have nothing to do: the tail is overwritten."""
        return

    # -- checks -----------------------------------------------------------------------------

    def _check_batch(self, count: int) -> None:
        if count != len(self.lengths):
            raise UsageError(
                f"{count} row(s) given to a session of {len(self.lengths)}", remedy="prefill starts a batch"
            )

    def _check_tokens(self, index: int, row: Sequence[int]) -> None:
        if not len(row):
            raise InputError(f"prompt {index} is empty", remedy="give at least one token")
        for position, token in enumerate(row):
            if not 0 <= token < self.vocab_size:
                raise InputError(
                    f"token id {token} is outside the vocabulary",
                    where=f"prompt {index}, position {position}",
                    why=f"the model has {self.vocab_size} token ids, from 0 to {self.vocab_size - 1}",
                    remedy="encode the text with the model's own tokenizer",
                )

    def _check(self, rows: Rows, held: Sequence[int]) -> None:
        for index, (row, length) in enumerate(zip(rows, held, strict=True)):
            self._check_tokens(index, row)
            excess = length + len(row) - self.context_length
            if excess > 0:
                raise InputError(
                    f"a row of {length + len(row)} tokens does not fit the context of {self.context_length}",
                    where=f"prompt {index}" + (f", after {length} tokens in the cache" if length else ""),
                    remedy=f"shorten it by {excess} token(s)",
                )


def most_likely(logits: npt.NDArray[np.floating]) -> list[int]:
    """The token of the largest logit of each row of [B, V], the smallest id among equals.

    Raises:
        GateError: it is not finite.
    """
    best: list[int] = logits.argmax(axis=1).tolist()  # NaN counts as the largest, so one look at the winner finds it
    for row, token in enumerate(best):
        if not math.isfinite(logits[row, token]):
            raise not_finite(f"row {row}, token {token}")
    return best


def not_finite(where: str) -> GateError:
    """The error for logits that are NaN or infinite."""
    return GateError(
        "the artifact computes logits that are not finite",
        where=where,
        why="a value overflowed, most likely in half precision",
        remedy="compile with --dtype fp32 or bf16",
    )


def default_threads() -> int:
    """Physical cores that this process may use."""
    physical = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else physical
    return max(1, min(physical, allowed))


def other_graph(where: str | Path, why: str) -> ArtifactError:
    """The error of a graph that is not the one that its manifest describes."""
    return ArtifactError(
        "the manifest's contract is not the graph's",
        where=str(where),
        why=why[:500],
        remedy="copy the artifact again from where it was made, or compile it again",
    )
