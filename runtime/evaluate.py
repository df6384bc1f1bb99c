"""Perplexity of an artifact, and how far it is from its source model: KL divergence, top-1 agreement.

Perplexity: the text is encoded once; window i reads tokens [i*W, i*W + W) from an empty cache and
predicts tokens [i*W + 1, i*W + W + 1); perplexity = exp(mean negative log-likelihood over all
predicted tokens). Tokens at the end that do not fill a window are left out; a text shorter than one
window is one shorter window. KL is KL(source || artifact), the mean over predicted tokens, in nats.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from optc.compiler.diagnostics import GateError, InputError, UsageError
from optc.runtime.session import Session

WINDOW = 1024

_SLICE_BYTES = 1 << 26
_MOST_NATS = 700.0

Reference = Callable[[Sequence[int]], torch.Tensor]
"""The source model: tokens [n] -> logits float32 [n, V]."""


@dataclass(frozen=True)
class Evaluation:
    """Quality over the predicted tokens of all windows.

    Attributes:
        tokens: predicted tokens.
        windows: evaluated windows, each of `window` predicted tokens.
        perplexity_ci95: from the spread of the windows' means (normal, in log space); None for
            fewer than two windows.
        reference_perplexity, kl, top1_agreement: None without a reference.
    """

    tokens: int
    windows: int
    window: int
    perplexity: float
    perplexity_ci95: tuple[float, float] | None
    reference_perplexity: float | None
    kl: float | None
    top1_agreement: float | None
    seconds: float


@dataclass
class _Sums:
    """Sums over tokens of one window."""

    tokens: int = 0
    nll: float = 0.0
    reference_nll: float = 0.0
    kl: float = 0.0
    agree: int = 0


@dataclass
class _Totals:
    windows: list[_Sums] = field(default_factory=list)

    def mean(self, name: str) -> float:
        tokens = sum(item.tokens for item in self.windows)
        return math.fsum(getattr(item, name) for item in self.windows) / tokens


def cut_windows(tokens: Sequence[int], window: int = WINDOW) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
    """(inputs, targets) of each window, both [W]; see the module's docstring.

    Raises:
        InputError: fewer than two tokens.
    """
    if len(tokens) < 2:
        raise InputError(
            f"the text has {len(tokens)} token(s), too few to predict anything", remedy="give a longer text"
        )
    size = min(window, len(tokens) - 1)
    for start in range(0, len(tokens) - size, size):
        yield tokens[start : start + size], tokens[start + 1 : start + size + 1]


def evaluate(
    session: Session,
    tokens: Sequence[int],
    reference: Reference | None = None,
    *,
    windows: int | None = None,
    on_window: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Score a text with a session and, where given, with the source model.

    Args:
        tokens: the whole text, encoded once.
        windows: evaluate only the first so many windows; None is all.
        on_window: called with (done, total) after each window.

    Raises:
        InputError: fewer than two tokens, or tokens outside the vocabulary.
        UsageError: `windows` below 1.
        GateError: logits that are not finite, or assign no probability at all to the text.
    """
    if windows is not None and windows < 1:
        raise UsageError(f"windows {windows} is out of range", remedy="use 1 or more")
    begin = time.perf_counter()
    window = min(WINDOW, session.context_length)
    pairs = list(cut_windows(tokens, window))[:windows]
    totals = _Totals()
    for inputs, targets in pairs:
        totals.windows.append(_window(session, inputs, targets, reference))
        on_window(len(totals.windows), len(pairs))
    has = reference is not None
    return Evaluation(
        tokens=sum(item.tokens for item in totals.windows),
        windows=len(pairs),
        window=len(pairs[0][0]),
        perplexity=_perplexity(totals.mean("nll"), "the artifact"),
        perplexity_ci95=_interval([item.nll / item.tokens for item in totals.windows]),
        reference_perplexity=_perplexity(totals.mean("reference_nll"), "the source model") if has else None,
        kl=totals.mean("kl") if has else None,
        top1_agreement=totals.mean("agree") if has else None,
        seconds=time.perf_counter() - begin,
    )


def _window(
    session: Session, inputs: Sequence[int], targets: Sequence[int], reference: Reference | None
) -> _Sums:
    sums, expected = _Sums(), None if reference is None else reference(inputs)
    for logits in session.score(inputs):
        start, end = sums.tokens, sums.tokens + len(logits)
        want = torch.tensor(targets[start:end])
        _add(sums, torch.from_numpy(logits), want, None if expected is None else expected[start:end])
    return sums


def _add(sums: _Sums, logits: torch.Tensor, targets: torch.Tensor, expected: torch.Tensor | None) -> None:
    """Add the tokens of `logits` [n, V], a slice at a time, in float64 (a KL of 1e-9 is meant)."""
    size = max(1, _SLICE_BYTES // (8 * logits.shape[1]))
    for start in range(0, len(logits), size):
        part = slice(start, start + size)
        log_q = torch.log_softmax(logits[part].double(), -1)
        index = targets[part, None]
        sums.nll -= float(log_q.gather(1, index).sum())
        sums.tokens += len(log_q)
        if expected is not None:
            log_p = torch.log_softmax(expected[part].double(), -1)
            sums.reference_nll -= float(log_p.gather(1, index).sum())
            p = log_p.exp()
            sums.kl += float(torch.where(p > 0, p * (log_p - log_q), 0.0).sum())
            sums.agree += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())


def _perplexity(nll: float, whose: str) -> float:
    if not nll < _MOST_NATS:
        raise GateError(
            f"the mean negative log-likelihood of {whose} is {nll}",
            why="logits are not finite, or so large that the text has no probability",
            remedy="compile with --dtype fp32 or bf16, and look at the drift of each pass (optc inspect)",
        )
    return math.exp(nll)


def _interval(means: Sequence[float]) -> tuple[float, float] | None:
    if len(means) < 2:
        return None
    spread = 1.96 * float(np.std(means, ddof=1)) / math.sqrt(len(means))
    center = float(np.mean(means))
    return math.exp(center - spread), math.exp(center + spread)
