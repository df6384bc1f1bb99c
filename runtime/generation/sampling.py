"""Choice of the next token: penalties, then the largest, or temperature, top-k, top-p, min-p, and a draw.

The order is that of transformers' `generate`. Top-p ("nucleus"): Holtzman et al. 2020,
https://arxiv.org/abs/1904.09751. Top-k: Fan et al. 2018, https://arxiv.org/abs/1805.04833.
Min-p: Nguyen et al. 2024, https://arxiv.org/abs/2407.01082.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from optc.runtime.sampling import Sampling
from optc.runtime.sessions.session import Logits, Session, most_likely, not_finite
from optc.runtime.sessions.streaming import Draw, StreamingSession

Weights = npt.NDArray[np.float32]
Uniforms = npt.NDArray[np.float64]
_BLOCK, _FEW = 256, 2048
"""Weights that are added up before blocks are; where there are fewer, one by one is as fast."""


def distribution(logits: npt.NDArray[np.floating], sampling: Sampling) -> npt.NDArray[np.float64]:
    """Probabilities [B, V] that a draw is made from; dropped tokens have exactly 0.

    Args:
        logits: [B, V], without NaN.
        sampling: with a temperature above 0.
    """
    out = np.zeros(logits.shape)
    for row, scores in zip(out, logits, strict=True):
        ids, weights = _kept(scores, sampling)
        row[ids] = weights / weights.sum(dtype=np.float64)
    return out


def _kept(logits: npt.NDArray[np.floating], sampling: Sampling) -> tuple[npt.NDArray[np.intp] | slice, Weights]:
    """The tokens of a row [V] that can be drawn, by ascending id, and their unnormalized probabilities."""
    assert not sampling.greedy
    scores = logits.astype(np.float32) / _divisor(sampling)
    size, ids = len(scores), None
    if 0 < sampling.top_k < size:
        kth = np.partition(scores, size - sampling.top_k)[size - sampling.top_k]
        ids = np.flatnonzero(scores >= kth)
        scores = scores[ids]
    weights: Weights = np.exp(scores - scores.max())
    if sampling.top_p < 1:
        chosen = _nucleus(weights, sampling.top_p)
        ids, weights = (chosen if ids is None else ids[chosen]), weights[chosen]
    if sampling.min_p > 0:
        chosen = np.flatnonzero(weights >= sampling.min_p)  # the likeliest weighs 1
        ids, weights = (chosen if ids is None else ids[chosen]), weights[chosen]
    return (slice(None) if ids is None else ids), weights


def _divisor(sampling: Sampling) -> np.float32:
    return np.float32(1 if sampling.greedy else sampling.heat)


def _nucleus(weights: Weights, top_p: float) -> npt.NDArray[np.intp]:
    """Indices of the fewest largest weights that make up `top_p` of the sum, with the last one's equals.

    Weights below (1 - top_p) / n of the sum cannot be among them, since all of those together are
    less than 1 - top_p: only the others are sorted.
    """
    total = weights.sum(dtype=np.float64)
    large = np.flatnonzero(weights >= (1 - top_p) * total / len(weights))
    descending = np.sort(weights[large])[::-1].astype(np.float64)
    before = np.cumsum(descending) - descending
    smallest = descending[np.count_nonzero(before < top_p * total) - 1]
    nucleus: npt.NDArray[np.intp] = large[weights[large] >= smallest]
    return nucleus


def chooser(
    session: Session, samplings: Sequence[Sampling], prompts: Sequence[Sequence[int]]
) -> Callable[[Logits], list[int]]:
    """From the last logits [B, V] of all rows to their next tokens, as the session or else the host chooses them."""
    if isinstance(session, StreamingSession):
        return functools.partial(session.choose, draws=draws_of(samplings, prompts))
    return Sampler(samplings, prompts)


def draws_of(samplings: Sequence[Sampling], prompts: Sequence[Sequence[int]]) -> list[Draw]:
    """What sessions that choose tokens themselves are given for each row; see `Sampler` for what rows share."""
    found = []
    for sampling, prompt, entropy in zip(samplings, prompts, _entropies(samplings, prompts), strict=True):
        seed = 0 if entropy is None else int(entropy.generate_state(1, np.uint64).astype(np.int64)[0])
        found.append(Draw(sampling=sampling, prompt_length=len(prompt), seed=seed))
    return found


def _entropies(samplings: Sequence[Sampling], prompts: Sequence[Sequence[int]]) -> list[np.random.SeedSequence | None]:
    """What fixes the draws of each row: its seed, its prompt, and how many rows with the same stand before it."""
    seen: Counter[tuple[int, ...]] = Counter()
    found: list[np.random.SeedSequence | None] = []
    for sampling, prompt in zip(samplings, prompts, strict=True):
        if sampling.greedy:
            found.append(None)
            continue
        key = (sampling.seed, *prompt)
        found.append(np.random.SeedSequence([sampling.seed, seen[key], *prompt]))
        seen[key] += 1
    return found


class RowSampler:
    """Chooses the tokens of one row, drawing from a stream of its own: no other row changes what it yields.

    Args:
        entropy: what fixes the draws; None where the row is greedy.
    """

    def __init__(self, sampling: Sampling, prompt: Sequence[int], entropy: np.random.SeedSequence | None) -> None:
        self._sampling, self._prompt = sampling, list(prompt)
        self._takes_best = sampling.greedy and not sampling.penalizes
        self._generated: Counter[int] = Counter()
        self._bits = np.random.PCG64(0 if entropy is None else entropy)
        self._stream = None if entropy is None else np.random.Generator(self._bits)

    def __call__(self, logits: npt.NDArray[np.floating], best: int, where: str = "") -> int:
        """The next token from logits [V], of which that of `best` is the largest, and finite.

        Raises:
            GateError: it becomes not finite by penalties or temperature.
        """
        sampling, token = self._sampling, best
        if self._takes_best:
            self._generated[token] += 1
            return token
        if sampling.penalizes:
            logits = _penalized(logits, sampling, self._prompt, self._generated)
            token = int(logits.argmax())
        if not np.isfinite(logits[token] / _divisor(sampling)):
            raise not_finite(f"{where}token {token}, after penalties and temperature")
        if self._stream is not None:
            token = _draw(logits, sampling, self._stream)
        self._generated[token] += 1
        return token

    def uniforms(self, count: int) -> Uniforms:
        """The numbers that the next tokens are drawn by, for those who draw themselves; zeros where the row is greedy.

        The stream stands where it stood: `take` moves it.
        """
        if self._stream is None:
            return np.zeros(count)
        found = self._stream.random(count)
        self._bits.advance(-count)
        return found

    def take(self, tokens: Sequence[int]) -> None:
        """The row goes on with tokens that others drew, each by the next of `uniforms`."""
        self._generated.update(tokens)
        if self._stream is not None:
            self._bits.advance(len(tokens))


def row_sampler(sampling: Sampling, prompt: Sequence[int]) -> RowSampler:
    """For a row alone: draws as the first row of a batch that has this seed and this prompt."""
    return RowSampler(sampling, prompt, _entropies([sampling], [prompt])[0])


class Sampler:
    """Chooses one token per row and step, for sessions that return logits.

    Each row draws from its own stream, seeded by the seed, its prompt and how many equal prompts
    stand before it: what a prompt yields does not depend on the other rows of the batch.

    Args:
        samplings: one per row.
    """

    def __init__(self, samplings: Sequence[Sampling], prompts: Sequence[Sequence[int]]) -> None:
        entropies = _entropies(samplings, prompts)
        self._rows = [RowSampler(*row) for row in zip(samplings, prompts, entropies, strict=True)]

    def __call__(self, logits: npt.NDArray[np.floating]) -> list[int]:
        """The next token of each row, from logits [B, V].

        Raises:
            GateError: logits that are not finite, or become so by penalties or temperature.
        """
        rows = enumerate(zip(most_likely(logits), self._rows, strict=True))
        return [sampler(logits[row], best, f"row {row}, ") for row, (best, sampler) in rows]


def _penalized(
    logits: npt.NDArray[np.floating], sampling: Sampling, prompt: Sequence[int], generated: Counter[int]
) -> npt.NDArray[np.float32]:
    """The logits of a row [V] after penalties for the tokens that it holds."""
    scores = logits.astype(np.float32)
    held = np.array(sorted({*prompt, *generated}))
    factor = np.float32(sampling.repetition_penalty)
    scores[held] = np.where(scores[held] > 0, scores[held] / factor, scores[held] * factor)
    if generated:
        ids, counts = np.array(list(generated)), np.array(list(generated.values()), np.float32)
        scores[ids] -= np.float32(sampling.presence_penalty)
        scores[ids] -= np.float32(sampling.frequency_penalty) * counts
    return scores


def _draw(logits: npt.NDArray[np.floating], sampling: Sampling, stream: np.random.Generator) -> int:
    """One token of a row, by inversion: the first whose cumulative probability exceeds a uniform number."""
    ids, weights = _kept(logits, sampling)
    index = inverse(weights, stream.random())
    return index if isinstance(ids, slice) else int(ids[index])


def inverse(weights: Weights, uniform: float) -> int:
    """The first index whose cumulative weight exceeds this share of the whole, from 0 on and below 1.

    Sums of blocks come first, then those inside one block: adding up a vocabulary number by number takes longer than its
    exponentials.
    """
    if len(weights) < _FEW:
        cumulative = np.cumsum(weights, dtype=np.float64)
        return _first_above(cumulative, uniform * cumulative[-1])[0]
    whole = len(weights) // _BLOCK * _BLOCK
    sums = np.append(
        weights[:whole].reshape(-1, _BLOCK).sum(1, dtype=np.float64), weights[whole:].sum(dtype=np.float64)
    )
    cumulative = np.cumsum(sums)
    block, share = _first_above(cumulative, uniform * cumulative[-1])
    inside = np.cumsum(weights[block * _BLOCK : (block + 1) * _BLOCK], dtype=np.float64)
    return block * _BLOCK + _first_above(inside, share - (cumulative[block - 1] if block else 0.0))[0]


def _first_above(cumulative: Uniforms, share: float) -> tuple[int, float]:
    """The first place that is above a share, and that share: rounding must not lift it to the total, which none exceeds."""
    share = min(share, float(np.nextafter(cumulative[-1], 0)))
    return int(np.searchsorted(cumulative, share, side="right")), share
