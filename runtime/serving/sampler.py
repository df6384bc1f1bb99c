"""Tokens of rows from their logits on the host: the largest of most rows in one operation, the others one by one.

What a row yields depends on its own logits, seed and prompt only, and on how many tokens it has drawn: a request keeps its
sampler when it gives way to others and is computed again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np
import torch

from optc.compiler.diagnostics import GateError, InputError
from optc.compiler.ops.dialect.sampling import NO_TOKEN
from optc.runtime.generation.sampling import RowSampler, Uniforms, draws_of, row_sampler
from optc.runtime.serving.accepting import NOT_FINITE
from optc.runtime.serving.grammar import Grammars, GrammarState, allowed
from optc.runtime.serving.request import Answer, Finish, Generate, TokenLogprobs
from optc.runtime.serving.rows import Ints, Kind
from optc.runtime.sessions.session import Logits
from optc.runtime.sessions.streaming import Draw


class RequestSampler:
    """How one request chooses.

    Attributes:
        logprobs: what it was to tell since they were taken last.
        grammar: where the answer stands in its grammar; None where it is free.
    """

    def __init__(self, request: Generate, grammar: GrammarState | None = None) -> None:
        self.request, self.grammar = request, grammar
        self.logprobs: list[TokenLogprobs] = []
        self.bias = sorted(request.logit_bias.items())
        self._row: RowSampler | None = None

    @functools.cached_property
    def draw(self) -> Draw:
        """For those that choose on a device."""
        return draws_of([self.request.sampling], [self.request.prompt])[0]

    def choose(self, logits: Logits) -> int:
        """The next token from logits [V], on the host; `NO_TOKEN` where they are not finite."""
        scores = logits.copy() if self.bias or self.grammar is not None else logits
        for token, bias in self.bias:
            scores[token] += bias
        if self.grammar is not None:
            scores[~allowed(self.grammar.bits, len(scores))] = -np.inf
        best = int(scores.argmax())  # NaN counts as the largest
        if not np.isfinite(scores[best]):
            return NO_TOKEN
        try:
            token = self._of_row()(scores, best)
        except GateError:
            return NO_TOKEN
        if self.request.logprobs is not None:
            self.logprobs.append(logprobs_of(logits, token, self.request.logprobs))
        self.take(token)
        return token

    def uniforms(self, count: int) -> Uniforms:
        """float64 [count], the numbers that the next tokens are drawn by; `take_all` says how many of them were."""
        return self._of_row().uniforms(count)

    def take_all(self, tokens: Sequence[int], logits: Logits | None) -> None:
        """The answer goes on with these tokens, which others chose from logits [W, V] of the model itself.

        Args:
            logits: needed where the request asks for log-probabilities.
        """
        real = [token for token in tokens if token != NO_TOKEN]
        self._of_row().take(real)
        for place, token in enumerate(real):
            if self.request.logprobs is not None:
                assert logits is not None
                self.logprobs.append(logprobs_of(logits[place], token, self.request.logprobs))
            self.take(token)

    def _of_row(self) -> RowSampler:
        if self._row is None:
            self._row = row_sampler(self.request.sampling, self.request.prompt)
        return self._row

    def take(self, token: int) -> None:
        """The answer goes on with this token."""
        if self.grammar is not None and token != NO_TOKEN:
            self.grammar.take(token)

    @property
    def complete(self) -> bool:
        """Whether nothing can follow what was taken."""
        return self.grammar is not None and self.grammar.complete

    @property
    def problem(self) -> str:
        """Why the answer ended with an error."""
        return (self.grammar and self.grammar.problem) or NOT_FINITE

    def take_logprobs(self, count: int) -> list[TokenLogprobs] | None:
        """Those of the next tokens, so many; None where the request wants none."""
        if self.request.logprobs is None:
            return None
        taken, self.logprobs = self.logprobs[:count], self.logprobs[count:]
        return taken


SamplerOf = Callable[[int], RequestSampler | None]
"""The sampler of a row; None where it takes the largest logit."""


def answer_of(
    identity: str, sampler: RequestSampler | None, tokens: list[int], finish: Finish | None, cached: int | None
) -> Answer:
    """An answer of these new tokens, with what the sampler has to tell of them and of an error."""
    logprobs, problem = (None, NOT_FINITE) if sampler is None else (sampler.take_logprobs(len(tokens)), sampler.problem)
    error = problem if finish == "error" else ""
    return Answer(id=identity, tokens=tokens, logprobs=logprobs, finish=finish, cached_tokens=cached, error=error)


def kind_of(request: Generate) -> Kind:
    """What choosing its tokens takes."""
    if request.logprobs is not None or request.logit_bias or request.grammar is not None:
        return Kind.OPEN
    if request.sampling.penalizes:
        return Kind.PENALIZED
    return Kind.GREEDY if request.sampling.greedy else Kind.DRAWN


def sampler_of(request: Generate, grammars: Grammars | None) -> RequestSampler | None:
    """The sampler of a request; None where it takes the largest logits.

    Raises:
        InputError, TargetError: a grammar that cannot be held to.
    """
    if request.grammar is None:
        return None if kind_of(request) == Kind.GREEDY else RequestSampler(request)
    if grammars is None:
        raise InputError("the model has no tokenizer, by which a grammar is compiled", remedy="leave the grammar out")
    return RequestSampler(request, grammars.open(request.grammar))


def choose(logits: Logits, samplers: Sequence[RequestSampler | None]) -> Ints:
    """The next token of each row of logits [R, V], by its sampler, or the largest; `NO_TOKEN` where they are not finite."""
    tokens: Ints = torch.ops.optc.argmax(torch.from_numpy(logits)).numpy()
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
