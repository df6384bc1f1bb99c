"""Drafters for tests, and engines that speculate."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from context_model import continuation
from serving import Got, run

from optc.runtime.serving.device_runner import DeviceRunner
from optc.runtime.serving.engine_options import EngineOptions
from optc.runtime.serving.grammar import Grammars
from optc.runtime.serving.model_runner import HostRunner
from optc.runtime.serving.paged_engine import PagedEngine
from optc.runtime.serving.request import Generate
from optc.runtime.sessions.paged import PagedModel
from optc.runtime.speculative.drafter import Ask, Drafter, Verified
from optc.runtime.speculative.figures import SpeculativeFigures
from optc.runtime.speculative.settings import Method, Speculation


class Guesser:
    """Drafts what `right` says is next, and something else for a share of the tokens.

    Attributes:
        seen: all that was observed.
    """

    def __init__(self, right: Callable[[list[int], int], Sequence[int]], wrong: float, vocabulary: int) -> None:
        self._right, self._wrong, self._vocabulary = right, wrong, vocabulary
        self._rng = np.random.default_rng(0)
        self.seen: list[Verified] = []
        self.forgotten: list[str] = []

    def propose(self, asks: Sequence[Ask]) -> list[list[int]]:
        found = []
        for ask in asks:
            tokens = self._right(ask.tokens.tolist(), ask.most)
            bad = self._rng.random(len(tokens)) < self._wrong
            found.append([(token + int(off)) % self._vocabulary for token, off in zip(tokens, bad, strict=True)])
        return found

    def observe(self, verified: Sequence[Verified]) -> None:
        self.seen += verified

    def forget(self, identity: str) -> None:
        self.forgotten.append(identity)

    def close(self) -> None:
        self.forgotten.append("")


class Branching(Guesser):
    """Drafts trees of two guesses of each head: what `right` says is next is the first of them, the second, or none."""

    def propose(self, asks: Sequence[Ask]) -> list[list[int]]:
        found = []
        for ask in asks:
            assert ask.shape is not None
            right = self._right(ask.tokens.tolist(), int(ask.shape.depths.max()))
            pairs = []
            for token in right:
                others = ((token + self._rng.integers(1, self._vocabulary, 2)) % self._vocabulary).tolist()
                choice = [[token, others[0]], [others[0], token], others]
                pairs.append(choice[int(self._rng.integers(0, 3))])
            pairs += [[0, 1]] * (int(ask.shape.depths.max()) - len(right))
            found.append(ask.shape.tokens(pairs)[: ask.most])
        return found


def teller(wanted: Sequence[Generate], plain: Mapping[str, Got], vocabulary: int, wrong: float = 0.3) -> Guesser:
    """Knows what each request got without drafts, and tells it wrong now and then."""
    texts = [[*item.prompt, *plain[item.id].tokens] for item in wanted]

    def right(tokens: list[int], most: int) -> list[int]:
        text = next(text for text in texts if text[: len(tokens)] == tokens)
        return text[len(tokens) : len(tokens) + most]

    return Guesser(right, wrong, vocabulary)


def speculating(
    model: PagedModel,
    drafter: Drafter,
    *,
    method: Method = "ngram",
    draft_tokens: int = 4,
    grammars: Grammars | None = None,
    **options: int,
) -> PagedEngine:
    """An engine that always drafts."""
    speculation = Speculation(method=method, draft_tokens=draft_tokens, adaptive=False)
    chosen = EngineOptions(speculation=speculation, **options)
    runner = functools.partial(DeviceRunner, drafts=True) if model.on_device else HostRunner
    return PagedEngine(model, chosen, runner, drafter=drafter, grammars=grammars)


def continued_in_a_small_pool(engine: PagedEngine) -> SpeculativeFigures:
    """Let an engine over a `context_model` whose pool is too small for them continue ragged prompts, three at a time: what
    comes is the model's own text, though requests give way."""
    wanted = [
        Generate(id=str(place), prompt=[place, 3, 1] * size, max_new_tokens=21)
        for place, size in enumerate((1, 5, 3, 2))
    ]
    got = run(engine, wanted)
    for item in wanted:
        assert (got[item.id].tokens, got[item.id].finish) == (continuation(item.prompt, 21), "length")
    metrics = engine.metrics()
    assert metrics.preemptions > 0
    assert metrics.speculation is not None
    assert metrics.speculation.acceptance_length is not None
    return metrics.speculation
