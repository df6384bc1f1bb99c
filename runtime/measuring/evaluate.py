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
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch

from optc.compiler.diagnostics import GateError, InputError, UsageError
from optc.compiler.settings.fields import check_range
from optc.runtime.bounds import Count
from optc.runtime.sessions.session import Session

WINDOW = 1024

_SLICE_BYTES = 1 << 26
_MOST_NATS = 700.0

Reference = Callable[[Sequence[int]], torch.Tensor]
"""The source model: tokens [n] -> logits float32 [n, V]."""
OnWindow = Callable[[int, int], None]


@dataclass(frozen=True)
class Evaluation:
    """Quality over the predicted tokens of all windows.

    Attributes:
        tokens: predicted tokens.
        windows: evaluated windows, each of `window` predicted tokens.
        perplexity_ci95: from the spread of the windows' means (normal, in log space); None for
            fewer than two windows.
        reference_perplexity, kl, top1_agreement: None without a reference.
        top_k, top_k_kl: the k that was asked for, and the top-k KL; None where not.
        seconds: spent on this session, the reference's time left out.
    """

    tokens: int
    windows: int
    window: int
    perplexity: float
    perplexity_ci95: tuple[float, float] | None
    reference_perplexity: float | None
    kl: float | None
    top1_agreement: float | None
    top_k: int | None
    top_k_kl: float | None
    seconds: float


@dataclass(frozen=True)
class Difference:
    """How much more (above 0) or less likely the second session finds the text than the first.

    Attributes:
        first, second: indices of the sessions.
        log_likelihood: the mean log-likelihood per token of `second` minus that of `first`, nats.
        ci95: from the spread over the windows of their difference (normal): both saw the same windows, so what
            makes a window hard cancels out. None for fewer than two windows.
    """

    first: int
    second: int
    log_likelihood: float
    ci95: tuple[float, float] | None


@dataclass(frozen=True)
class Comparison:
    """Several sessions on one text: an evaluation of each, in order, and the differences of all pairs."""

    evaluations: tuple[Evaluation, ...]
    differences: tuple[Difference, ...]


@dataclass
class _Sums:
    """Sums over tokens of one window."""

    tokens: int = 0
    nll: float = 0.0
    reference_nll: float = 0.0
    kl: float = 0.0
    top_k_kl: float = 0.0
    agree: int = 0
    seconds: float = 0.0

    @property
    def log_likelihood(self) -> float:
        """Mean over the window's tokens."""
        return -self.nll / self.tokens


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
    top_k: int | None = None,
    on_window: OnWindow = lambda done, total: None,
) -> Evaluation:
    """Score a text with a session and, where given, with the source model; see `compare`."""
    found = compare([session], tokens, reference, windows=windows, top_k=top_k, on_window=on_window)
    return found.evaluations[0]


def compare(
    sessions: Sequence[Session],
    tokens: Sequence[int],
    reference: Reference | None = None,
    *,
    windows: int | None = None,
    top_k: int | None = None,
    on_window: OnWindow = lambda done, total: None,
) -> Comparison:
    """Score a text with several sessions, window by window; the reference is run once per window.

    Args:
        sessions: at least one, of one vocabulary. Windows fit the shortest context among them.
        tokens: the whole text, encoded once.
        windows: evaluate only the first so many windows; None is all.
        top_k: k of the top-k KL; None leaves it out.
        on_window: called with (done, total) after each window.

    Raises:
        InputError: fewer than two tokens, or tokens outside the vocabulary.
        UsageError: `windows` or `top_k` out of range, or `top_k` without a reference.
        GateError: logits that are not finite, or assign no probability at all to the text.
    """
    _check(sessions, reference, windows, top_k)
    window = min(WINDOW, *(session.context_length for session in sessions))
    pairs = list(cut_windows(tokens, window))[:windows]
    table: list[list[_Sums]] = [[] for _ in sessions]
    for done, (inputs, targets) in enumerate(pairs, start=1):
        expected = None if reference is None else reference(inputs)
        for session, row in zip(sessions, table, strict=True):
            begin = time.perf_counter()
            sums = _window(session, inputs, targets, expected, top_k)
            sums.seconds = time.perf_counter() - begin
            row.append(sums)
        on_window(done, len(pairs))
    evaluations = tuple(_evaluation(row, reference is not None, top_k) for row in table)
    differences = tuple(_difference(table, a, b) for a, b in combinations(range(len(table)), 2))
    return Comparison(evaluations, differences)


def _check(sessions: Sequence[Session], reference: Reference | None, windows: int | None, top_k: int | None) -> None:
    assert len({session.vocab_size for session in sessions}) == 1, "the sessions have different vocabularies"
    if windows is not None:
        check_range("windows", windows, Count)
    if top_k is not None:
        check_range("top-k", top_k, Count)
    if top_k is not None and not 1 <= top_k <= sessions[0].vocab_size:
        raise UsageError(f"top-k {top_k} is out of range", remedy=f"use 1 to {sessions[0].vocab_size}")
    if top_k is not None and reference is None:
        raise UsageError("top-k KL needs a reference", remedy="leave --top-k or --no-reference out")


def _evaluation(row: Sequence[_Sums], has: bool, top_k: int | None) -> Evaluation:
    tokens = sum(item.tokens for item in row)

    def mean(name: str) -> float:
        return math.fsum(getattr(item, name) for item in row) / tokens

    return Evaluation(
        tokens=tokens,
        windows=len(row),
        window=row[0].tokens,
        perplexity=_perplexity(mean("nll"), "the artifact"),
        perplexity_ci95=_exp(_interval([-item.log_likelihood for item in row])),
        reference_perplexity=_perplexity(mean("reference_nll"), "the source model") if has else None,
        kl=mean("kl") if has else None,
        top1_agreement=mean("agree") if has else None,
        top_k=top_k,
        top_k_kl=mean("top_k_kl") if top_k is not None else None,
        seconds=math.fsum(item.seconds for item in row),
    )


def _difference(table: Sequence[Sequence[_Sums]], first: int, second: int) -> Difference:
    # Windows are of equal length, so the mean over windows is the mean over tokens.
    gaps = [b.log_likelihood - a.log_likelihood for a, b in zip(table[first], table[second], strict=True)]
    return Difference(first, second, math.fsum(gaps) / len(gaps), _interval(gaps))


def _window(
    session: Session,
    inputs: Sequence[int],
    targets: Sequence[int],
    expected: torch.Tensor | None,
    top_k: int | None,
) -> _Sums:
    """Sums of one window; `expected` are the reference's logits [W, V]."""
    sums = _Sums()
    for logits in session.score(inputs):
        start, end = sums.tokens, sums.tokens + len(logits)
        want = torch.tensor(targets[start:end])
        _add(sums, torch.from_numpy(logits), want, None if expected is None else expected[start:end], top_k)
    return sums


def _add(
    sums: _Sums, logits: torch.Tensor, targets: torch.Tensor, expected: torch.Tensor | None, top_k: int | None
) -> None:
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
            sums.kl += _divergence(log_p, log_q)
            sums.agree += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
            if top_k is not None:
                kept = log_p.topk(top_k, -1).indices
                sums.top_k_kl += _divergence(_coarse(log_p, kept), _coarse(log_q, kept))


def _divergence(log_p: torch.Tensor, log_q: torch.Tensor) -> float:
    """Sum over rows of KL(p || q), nats; events without probability in p count nothing."""
    p = log_p.exp()
    return float(torch.where(p > 0, p * (log_p - log_q), 0.0).sum())


def _coarse(log_p: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Log-probabilities [n, V] -> [n, k + 1]: those of the tokens `kept` [n, k], and of all others together.

    The others are summed, not taken as one minus the kept: near 1 that would leave rounding errors alone.
    """
    rest = log_p.scatter(1, kept, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_p.gather(1, kept), rest], -1)


def _perplexity(nll: float, whose: str) -> float:
    if not nll < _MOST_NATS:
        raise GateError(
            f"the mean negative log-likelihood of {whose} is {nll}",
            why="logits are not finite, or so large that the text has no probability",
            remedy="compile with --dtype fp32 or bf16, and look at the drift of each pass (optc inspect)",
        )
    return math.exp(nll)


def _interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The mean's 95 % interval from the spread of the values; None for fewer than two."""
    if len(values) < 2:
        return None
    spread = 1.96 * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    center = float(np.mean(values))
    return center - spread, center + spread


def _exp(interval: tuple[float, float] | None) -> tuple[float, float] | None:
    return None if interval is None else (math.exp(interval[0]), math.exp(interval[1]))
