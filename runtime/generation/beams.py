"""Beam search over the answers of an encoder-decoder model, as transformers' `generate(num_beams=N)` does it.

A beam is an answer so far and the sum of its tokens' log probabilities. In each step the best continuations of all beams of a
prompt are taken; those among the first N that end are finished, the best N of the others go on. Finished answers are
compared by sum / length ** length_penalty (Wu et al., 2016, without coverage).
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import numpy as np

from optc.compiler.diagnostics import GateError
from optc.compiler.settings.fields import check_range, check_type
from optc.runtime.bounds import Beams, Count, LengthPenalty
from optc.runtime.generation.generate import GenerationResult, StopReason
from optc.runtime.sessions.encoder_decoder import Array, EncoderDecoderSession
from optc.runtime.sessions.session import Rows


@dataclass(frozen=True)
class BeamSettings:
    """How beams are searched.

    Attributes:
        beams: of each prompt.
        length_penalty: above 0 longer answers are preferred, below 0 shorter ones.
        early_stopping: end as soon as `beams` answers are finished; else when no open one seems able to be better.
    """

    beams: int = 4
    length_penalty: float = 1.0
    early_stopping: bool = False

    def __post_init__(self) -> None:
        check_range("beams", self.beams, Beams)
        check_range("length-penalty", self.length_penalty, LengthPenalty)
        check_type("early_stopping", self.early_stopping, bool, "True or False")


@dataclass(frozen=True)
class _Finished:
    """An answer with its score, the larger the better."""

    score: np.float32
    tokens: tuple[int, ...]
    stop: StopReason


@dataclass
class _Search:
    """The beams of one prompt.

    Attributes:
        answers: tokens of each open beam, the best first. scores: sums of their log probabilities, float32.
    """

    settings: BeamSettings
    stop_ids: frozenset[int]
    limit: int
    at_limit: StopReason
    answers: list[tuple[int, ...]] = field(default_factory=lambda: [()])
    scores: Array = field(default_factory=lambda: np.zeros(1, np.float32))
    finished: list[_Finished] = field(default_factory=list)

    def step(self, log_probabilities: Array) -> list[int]:
        """Continue every open beam by a token, given [beams, vocabulary]; returns which beam each new one continues.

        None goes on where the search has ended.
        """
        beams, size = self.settings.beams, log_probabilities.shape[-1]
        sums = (log_probabilities + self.scores[:, None]).reshape(-1)
        count = min(max(2, 1 + len(self.stop_ids)) * beams, sums.size)
        best = np.argsort(-sums, kind="stable")[:count]
        length = len(self.answers[0]) + 1
        kept: list[tuple[int, int, np.float32]] = []
        for place, index in enumerate(best.tolist()):
            beam, token = divmod(index, size)
            ends: StopReason | None = "stop-token" if token in self.stop_ids else None
            ends = ends or (self.at_limit if length >= self.limit else None)
            if not np.isfinite(sums[index]):
                continue  # a token that answers never have
            if ends is None:
                kept.append((beam, token, sums[index]))
            elif place < beams:
                answer = (*self.answers[beam], token)
                self.finished.append(_Finished(self._scored(sums[index], length), answer, ends))
        kept = kept[:beams]
        self.answers = [(*self.answers[beam], token) for beam, token, _ in kept]
        self.scores = np.array([score for *_, score in kept], np.float32)
        return [] if self._ended(length) else [beam for beam, *_ in kept]

    def _scored(self, total: np.float32, length: int) -> np.float32:
        return np.float32(total / np.float32(length**self.settings.length_penalty))

    def _ended(self, length: int) -> bool:
        """Whether what is open is not worth going on with; forgets all finished answers but the best."""
        self.finished = sorted(self.finished, key=lambda item: -item.score)[: self.settings.beams]
        if not self.answers:
            return True
        if len(self.finished) < self.settings.beams:
            return False
        best = self._scored(self.scores[0], length)
        return self.settings.early_stopping or bool(best <= self.finished[-1].score)


def beam_search(
    session: EncoderDecoderSession,
    prompts: Rows,
    settings: BeamSettings,
    *,
    max_new_tokens: int,
    stop_ids: Collection[int] = (),
) -> GenerationResult:
    """The best answer to each prompt; all open beams of all prompts are one batch of the decoder.

    Raises:
        UsageError: `max_new_tokens` below 1. InputError: prompts that the session refuses.
        GateError: log probabilities that are NaN.
    """
    check_range("max-new-tokens", max_new_tokens, Count)
    room = session.context_length - len(session.start_ids) + 1  # the last token is not fed
    limit, at_limit = min((max_new_tokens, "length"), (room, "context"))
    begin = time.perf_counter()
    found = _checked(session.begin(prompts))
    first = time.perf_counter()
    searches = [_Search(settings, frozenset(stop_ids), limit, at_limit) for _ in prompts]  # type: ignore[arg-type]
    places, steps = [[row] for row in range(len(prompts))], 0  # the decoder's rows of each prompt
    while True:
        rows, tokens = [], []
        for search, own in zip(searches, places, strict=True):
            chosen = search.step(found[own]) if own else []
            rows += [own[beam] for beam in chosen]
            tokens += [answer[-1] for answer in search.answers] if chosen else []
            own[:] = range(len(rows) - len(chosen), len(rows))
        if not rows:
            break
        found = _checked(session.branch(rows, tokens))
        steps += 1
    end = time.perf_counter()
    return _result([search.finished[0] for search in searches], (begin, first, end), steps)


def _checked(log_probabilities: Array) -> Array:
    if np.isnan(log_probabilities).any():
        raise GateError(
            "the model's logits are not finite",
            why="NaN among the log probabilities of an answer",
            remedy="compile the model in float32, and check its weights",
        )
    return log_probabilities


def _result(best: Sequence[_Finished], times: tuple[float, float, float], steps: int) -> GenerationResult:
    begin, first, end = times
    return GenerationResult(
        tokens=[list(answer.tokens) for answer in best],
        stop=[answer.stop for answer in best],
        ttft_ms=(first - begin) * 1e3,
        tpot_ms=(end - first) * 1e3 / steps if steps else None,
        steps=steps,
    )
