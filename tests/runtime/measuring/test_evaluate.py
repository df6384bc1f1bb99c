"""Perplexity, KL and agreement against sums written out by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from optc.compiler.diagnostics import GateError, InputError, UsageError
from optc.runtime.measuring.evaluate import compare, cut_windows, evaluate
from optc.runtime.sessions.session import Logits, Rows, Session

VOCAB = 7


def _table(seed: int) -> torch.Tensor:
    return torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


class Bigram(Session):
    """The logits of a token are a row of a table; `chunk` is 300 so that windows come in pieces."""

    chunk = 300  # type: ignore[assignment]

    def __init__(self, table: torch.Tensor, context_length: int = 4096) -> None:
        super().__init__(vocab_size=VOCAB, context_length=context_length)
        self.table = table.numpy()

    def close(self) -> None:
        pass

    def _start(self, batch: int) -> None:
        pass

    def _advance(self, rows: Rows) -> Logits:
        return np.stack([self.table[row[-1]] for row in rows])

    def _score(self, tokens: Sequence[int]) -> Logits:
        found: Logits = self.table[list(tokens)]
        return found


def _tokens(count: int) -> list[int]:
    return np.random.default_rng(0).integers(0, VOCAB, count).tolist()


def test_windows_predict_1024_tokens_each() -> None:
    tokens = _tokens(3 * 1024 + 500)
    pairs = list(cut_windows(tokens))
    assert [(len(a), len(b)) for a, b in pairs] == [(1024, 1024)] * 3
    assert [b for _, part in pairs for b in part] == tokens[1 : 3 * 1024 + 1]
    assert all(a[1:] == b[:-1] for a, b in pairs)


@pytest.mark.parametrize(
    ("count", "sizes"), [(2, [1]), (1024, [1023]), (1025, [1024]), (2048, [1024]), (2049, [1024] * 2)]
)
def test_window_counts(count: int, sizes: list[int]) -> None:
    assert [len(targets) for _, targets in cut_windows(_tokens(count))] == sizes


def test_against_sums_by_hand() -> None:
    artifact, source, tokens = _table(0), _table(1), _tokens(2 * 1024 + 1)
    result = evaluate(Bigram(artifact), tokens, lambda part: source[torch.tensor(part)])
    log_q, log_p = (table.double().log_softmax(-1) for table in (artifact, source))
    pairs = list(pairwise(tokens))
    assert result.tokens == len(pairs) == 2048
    assert (result.windows, result.window) == (2, 1024)
    nll = [-sum(float(table[a, b]) for a, b in pairs) / len(pairs) for table in (log_q, log_p)]
    assert result.perplexity == pytest.approx(math.exp(nll[0]), rel=1e-12)
    assert result.reference_perplexity == pytest.approx(math.exp(nll[1]), rel=1e-12)
    kl = sum(float((log_p[a].exp() * (log_p[a] - log_q[a])).sum()) for a, _ in pairs) / len(pairs)
    assert result.kl == pytest.approx(kl, rel=1e-9)
    agree = [int(artifact[a].argmax() == source[a].argmax()) for a, _ in pairs]
    assert result.top1_agreement == sum(agree) / len(agree)
    halves = [-sum(float(log_q[a, b]) for a, b in part) / 1024 for part in (pairs[:1024], pairs[1024:])]
    spread = 1.96 * abs(halves[0] - halves[1]) / 2  # standard error of the mean of two
    assert result.perplexity_ci95 == pytest.approx((math.exp(nll[0] - spread), math.exp(nll[0] + spread)))


def test_equal_models_have_no_divergence() -> None:
    table = _table(0)
    result = evaluate(Bigram(table), _tokens(1500), lambda part: table[torch.tensor(part)])
    assert (result.kl, result.top1_agreement, result.perplexity_ci95) == (0.0, 1.0, None)
    assert result.perplexity == result.reference_perplexity


def test_masked_tokens_do_not_spoil_kl() -> None:
    table = _table(0).clone()
    table[:, 6] = -math.inf
    tokens = [token % 6 for token in _tokens(200)]
    assert evaluate(Bigram(table), tokens, lambda part: table[torch.tensor(part)]).kl == 0.0


def test_without_reference_and_with_a_limit() -> None:
    seen: list[tuple[int, int]] = []
    result = evaluate(
        Bigram(_table(0)), _tokens(5000), windows=2, on_window=lambda done, total: seen.append((done, total))
    )
    assert (result.windows, result.tokens) == (2, 2048)
    assert result.reference_perplexity is None
    assert result.kl is None
    assert result.top1_agreement is None
    assert seen == [(1, 2), (2, 2)]


def test_short_context_shortens_the_windows() -> None:
    result = evaluate(Bigram(_table(0), context_length=64), _tokens(200))
    assert (result.window, result.windows, result.tokens) == (64, 3, 192)


def test_refuses() -> None:
    session = Bigram(_table(0))
    with pytest.raises(InputError) as caught:
        evaluate(session, [3])
    assert caught.value.what == "the text has 1 token(s), too few to predict anything"
    with pytest.raises(UsageError, match="windows 0 is out of range"):
        evaluate(session, [1, 2, 3], windows=0)
    with pytest.raises(GateError, match="mean negative log-likelihood of the artifact is nan"):
        evaluate(Bigram(torch.full((VOCAB, VOCAB), math.nan)), [1, 2, 3])
    with pytest.raises(GateError, match="mean negative log-likelihood of the source model is nan"):
        evaluate(session, [1, 2, 3], lambda part: torch.full((2, VOCAB), math.nan))


# -- top-k KL and comparisons -------------------------------------------------------------------


def _top_k_by_hand(source: torch.Tensor, artifact: torch.Tensor, a: int, k: int) -> float:
    p, q = (table[a].double().softmax(-1).tolist() for table in (source, artifact))
    kept = sorted(range(VOCAB), key=lambda token: -p[token])[:k]
    events = [(p[token], q[token]) for token in kept]
    rest = [token for token in range(VOCAB) if token not in kept]
    if rest:
        events.append((sum(p[token] for token in rest), sum(q[token] for token in rest)))
    return sum(x * math.log(x / y) for x, y in events)


@pytest.mark.parametrize("k", [1, 3, VOCAB - 1, VOCAB])
def test_top_k_kl_by_hand(k: int) -> None:
    artifact, source, tokens = _table(0), _table(1), _tokens(400)
    result = evaluate(Bigram(artifact), tokens, lambda part: source[torch.tensor(part)], top_k=k)
    expected = [_top_k_by_hand(source, artifact, a, k) for a in tokens[:-1]]
    assert result.top_k == k
    assert result.kl is not None
    assert result.top_k_kl == pytest.approx(sum(expected) / len(expected), rel=1e-9)
    # Merging events loses divergence; all but one token are as good as all.
    assert result.top_k_kl <= result.kl * (1 + 1e-12)
    assert (result.top_k_kl == pytest.approx(result.kl, rel=1e-9)) is (k >= VOCAB - 1)


def test_top_k_kl_where_all_probability_is_on_the_kept() -> None:
    source, artifact = torch.full((VOCAB, VOCAB), -math.inf), torch.zeros(VOCAB, VOCAB)
    source[:, 2] = 0.0
    tokens = [2] * 50
    result = evaluate(Bigram(artifact), tokens, lambda part: source[torch.tensor(part)], top_k=2)
    assert result.top_k_kl == pytest.approx(math.log(VOCAB)) == result.kl


def test_compare_runs_the_reference_once_and_equals_single_evaluations() -> None:
    source, tokens, calls = _table(1), _tokens(3 * 1024 + 1), []

    def reference(part: Sequence[int]) -> torch.Tensor:
        calls.append(len(part))
        return source[torch.tensor(part)]

    tables = [_table(0), _table(2), _table(0)]
    found = compare([Bigram(table) for table in tables], tokens, reference, top_k=3)
    assert calls == [1024] * 3
    for table, one in zip(tables, found.evaluations, strict=True):
        alone = evaluate(Bigram(table), tokens, lambda part: source[torch.tensor(part)], top_k=3)
        assert replace(one, seconds=0.0) == replace(alone, seconds=0.0)
    assert [(row.first, row.second) for row in found.differences] == [(0, 1), (0, 2), (1, 2)]
    same = found.differences[1]
    assert (same.log_likelihood, same.ci95) == (0.0, (0.0, 0.0)), "equal models differ by nothing, surely"


def test_paired_interval_by_hand() -> None:
    tables, tokens = [_table(0), _table(2)], _tokens(3 * 64 + 1)
    found = compare([Bigram(table, context_length=size) for table, size in zip(tables, (64, 99), strict=True)], tokens)
    assert [row.window for row in found.evaluations] == [64, 64], "the shortest context counts"
    log_p = [table.double().log_softmax(-1) for table in tables]
    gaps = []
    for start in (0, 64, 128):
        pairs = list(pairwise(tokens[start : start + 65]))
        gaps.append(sum(float(log_p[1][a, b] - log_p[0][a, b]) for a, b in pairs) / 64)
    mean = sum(gaps) / 3
    spread = 1.96 * math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / 2 / 3)
    (row,) = found.differences
    assert row.log_likelihood == pytest.approx(mean, rel=1e-9)
    assert row.ci95 == pytest.approx((mean - spread, mean + spread), rel=1e-9)
    nll = [math.log(item.perplexity) for item in found.evaluations]
    assert nll[0] - nll[1] == pytest.approx(row.log_likelihood, rel=1e-9)


def test_one_window_has_no_interval() -> None:
    (row,) = compare([Bigram(_table(0)), Bigram(_table(2))], _tokens(20)).differences
    assert row.ci95 is None


def test_top_k_of_another_type() -> None:
    with pytest.raises(UsageError, match="top-k cannot be '3'"):
        evaluate(Bigram(_table(0)), _tokens(20), lambda part: _table(1)[torch.tensor(part)], top_k="3")  # type: ignore[arg-type]


@pytest.mark.parametrize("k", [0, VOCAB + 1])
def test_top_k_out_of_range(k: int) -> None:
    with pytest.raises(UsageError, match=f"top-k {k} is out of range"):
        evaluate(Bigram(_table(0)), _tokens(20), lambda part: _table(1)[torch.tensor(part)], top_k=k)
    with pytest.raises(UsageError, match="top-k KL needs a reference"):
        evaluate(Bigram(_table(0)), _tokens(20), top_k=2)
