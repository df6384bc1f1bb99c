"""Tokens of rows from their logits on the host: the largest of most rows in one operation, the others one by one.

What a row yields depends on its own logits, seed and prompt only, and on how many tokens it has drawn: a request keeps its
sampler when it gives way to others and is computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from optc.compiler.diagnostics import GateError
from optc.compiler.ops.dialect.sampling import NO_TOKEN
from optc.runtime.generation.sampling import RowSampler, row_sampler
from optc.runtime.serving.request import Generate, TokenLogprobs
from optc.runtime.serving.rows import Ints
from optc.runtime.sessions.session import Logits


@dataclass(slots=True)
class RequestSampler:
    """How one request chooses; `logprobs` is what it was to tell since they were taken last."""

    request: Generate
    draw: RowSampler
    bias: tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]] | None
    logprobs: list[TokenLogprobs] = field(default_factory=list)

    def choose(self, logits: Logits) -> int:
        """The next token from logits [V]; `NO_TOKEN` where they are not finite."""
        scores = logits
        if self.bias is not None:
            scores = logits.copy()
            scores[self.bias[0]] += self.bias[1]
        best = int(scores.argmax())  # NaN counts as the largest
        if not np.isfinite(scores[best]):
            return NO_TOKEN
        try:
            token = self.draw(scores, best)
        except GateError:
            return NO_TOKEN
        if self.request.logprobs is not None:
            self.logprobs.append(logprobs_of(logits, token, self.request.logprobs))
        return token

    def take_logprobs(self, count: int) -> list[TokenLogprobs] | None:
        """Those of the next tokens, so many; None where the request wants none."""
        if self.request.logprobs is None:
            return None
        taken, self.logprobs = self.logprobs[:count], self.logprobs[count:]
        return taken


def is_plain(request: Generate) -> bool:
    """Whether a request takes the largest logits as they are, and wants nothing else told."""
    return (
        request.sampling.greedy
        and not request.sampling.penalizes
        and request.logprobs is None
        and not request.logit_bias
        and request.grammar is None
    )


def make_sampler(request: Generate) -> RequestSampler:
    """The sampler of a request that is not plain."""
    bias = None
    if request.logit_bias:
        ids = np.array(list(request.logit_bias), np.int64)
        bias = ids, np.array(list(request.logit_bias.values()), np.float32)
    return RequestSampler(request, row_sampler(request.sampling, request.prompt), bias)


def choose(logits: Logits, samplers: Sequence[RequestSampler | None]) -> Ints:
    """The next token of each row of logits [R, V], by its sampler, or the largest; `NO_TOKEN` where they are not finite."""
    best = logits.argmax(axis=1)
    tokens = np.where(np.isfinite(logits[np.arange(len(best)), best]), best, NO_TOKEN)
    for row, sampler in enumerate(samplers):
        if sampler is not None:
            tokens[row] = sampler.choose(logits[row])
    return tokens


def logprobs_of(logits: Logits, token: int, count: int) -> TokenLogprobs:
    """Of a token and of the likeliest `count` ones, by the logits [V] of the model itself."""
    scores = logits.astype(np.float64)
    top = scores.max()
    scores -= top + np.log(np.exp(scores - top).sum())
    likeliest = np.argpartition(-scores, min(count, len(scores) - 1))[:count] if count else np.zeros(0, np.int64)
    order = likeliest[np.lexsort((likeliest, -scores[likeliest]))]
    return TokenLogprobs(float(scores[token]), [(int(i), float(scores[i])) for i in order])
