"""Choice of the next token: greedy, or temperature, then top-k, then top-p, then a draw.

The order is that of transformers' `generate`. Top-p ("nucleus"): Holtzman et al. 2020,
https://arxiv.org/abs/1904.09751. Top-k: Fan et al. 2018, https://arxiv.org/abs/1805.04833.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from optc.compiler.diagnostics import GateError, UsageError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: divides the logits; 0 is greedy, which takes the largest logit (the smallest id
            among equals) and ignores the rest.
        top_k: keep the k likeliest tokens, and those as likely as the k-th; 0 keeps all.
        top_p: of those, keep the fewest likeliest tokens whose probabilities reach `top_p`, and
            those as likely as the last; 1 keeps all.
        seed: with the prompt, it fixes the draws.

    Raises:
        UsageError: a value out of range, or `top_k`/`top_p` with greedy decoding.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"temperature {self.temperature} is out of range", remedy="use 0 (greedy) or a positive number")
        if self.top_k < 0:
            raise UsageError(f"top-k {self.top_k} is out of range", remedy="use 0 (off) or a positive count")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top-p {self.top_p} is out of range", remedy="use a number above 0 and up to 1 (off)")
        if self.seed < 0:
            raise UsageError(f"seed {self.seed} is negative", remedy="use 0 or more")
        if self.greedy and (self.top_k or self.top_p < 1):
            raise UsageError(
                "top-k and top-p do nothing at temperature 0", remedy="give a temperature above 0, or leave them out"
            )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


def distribution(logits: npt.NDArray[np.floating], sampling: Sampling) -> npt.NDArray[np.float64]:
    """Probabilities [B, V] that a draw is made from; dropped tokens have exactly 0.

    Args:
        logits: [B, V], finite.
        sampling: with a temperature above 0.
    """
    assert not sampling.greedy
    scores = logits.astype(np.float64) / sampling.temperature
    size = scores.shape[1]
    if 0 < sampling.top_k < size:
        kth = np.partition(scores, size - sampling.top_k, axis=1)[:, size - sampling.top_k]
        scores[scores < kth[:, None]] = -np.inf
    scores -= scores.max(axis=1, keepdims=True)
    probabilities = np.exp(scores)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    if sampling.top_p < 1:
        descending = np.sort(probabilities, axis=1)[:, ::-1]
        before = np.cumsum(descending, axis=1) - descending
        last = np.count_nonzero(before < sampling.top_p, axis=1) - 1
        smallest = np.take_along_axis(descending, last[:, None], axis=1)
        probabilities[probabilities < smallest] = 0
        probabilities /= probabilities.sum(axis=1, keepdims=True)
    return probabilities


class Sampler:
    """Chooses one token per row and step.

    Each row draws from its own stream, seeded by the seed, its prompt and how many equal prompts
    stand before it: what a prompt yields does not depend on the other rows of the batch.
    """

    def __init__(self, sampling: Sampling, prompts: Sequence[Sequence[int]]) -> None:
        self.sampling = sampling
        seen: Counter[tuple[int, ...]] = Counter()
        self._streams: list[np.random.Generator] = []
        for prompt in map(tuple, [] if sampling.greedy else prompts):
            entropy = np.random.SeedSequence([sampling.seed, seen[prompt], *prompt])
            self._streams.append(np.random.Generator(np.random.PCG64(entropy)))
            seen[prompt] += 1

    def __call__(self, logits: npt.NDArray[np.floating]) -> list[int]:
        """The next token of each row, from logits [B, V].

        Raises:
            GateError: logits that are not numbers.
        """
        best = logits.argmax(axis=1)  # NaN counts as the largest, so one look at the winner finds it
        top = logits[np.arange(len(best)), best]
        if not np.isfinite(top).all():
            row = int(np.flatnonzero(~np.isfinite(top))[0])
            raise GateError(
                "the artifact computes logits that are not finite",
                where=f"row {row}, token {int(best[row])}",
                why="a value overflowed, most likely in half precision",
                remedy="compile with --dtype fp32 or bf16",
            )
        if self.sampling.greedy:
            return [int(token) for token in best]
        cumulative = np.cumsum(distribution(logits, self.sampling), axis=1)
        drawn = np.array([stream.random() for stream in self._streams]) * cumulative[:, -1]
        # The first token whose cumulative probability exceeds the draw; one of probability 0 never does.
        return [int(np.searchsorted(row, u, side="right")) for row, u in zip(cumulative, drawn, strict=True)]
