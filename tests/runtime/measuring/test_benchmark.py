"""What a benchmark counts, on a session whose work is counted."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import psutil
import pytest

from optc.compiler.diagnostics import UsageError
from optc.runtime.generation.generate import GenerationResult
from optc.runtime.measuring.benchmark import (
    benchmark,
    environment,
    median_rate,
    peak_rss_bytes,
    read_bandwidth,
)
from optc.runtime.sessions.session import Logits, Rows, Session


class Counting(Session):
    """Notes the shape of every call."""

    def __init__(self) -> None:
        super().__init__(vocab_size=11, context_length=64)
        self.prefills: list[tuple[int, int]] = []
        self.prompts: list[tuple[int, ...]] = []
        self.decodes = 0

    def close(self) -> None:
        pass

    def _start(self, batch: int) -> None:
        pass

    def _advance(self, rows: Rows) -> Logits:
        self.lengths = [n + len(row) for n, row in zip(self.lengths, rows, strict=True)]
        if len(rows[0]) > 1:
            self.prefills.append((len(rows), len(rows[0])))
            self.prompts += [tuple(row) for row in rows]
        else:
            self.decodes += 1
        return np.zeros((len(rows), 11), np.float32)

    def _score(self, tokens: Sequence[int]) -> Logits:
        raise AssertionError("a benchmark scores nothing")


def test_counts_samples_warm_up_and_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optc.runtime.measuring.benchmark.read_bandwidth", lambda threads: 1e9 * threads)
    session, seen = Counting(), []
    result = benchmark(
        session,
        prompt_lengths=(8, 16),
        new_tokens=5,
        batch=3,
        samples=4,
        warmup=2,
        threads=2,
        on_sample=lambda done, total: seen.append((done, total)),
    )
    assert session.prefills == [(3, 8), (3, 16)] * 6
    assert session.decodes == 12 * 4
    assert len(set(session.prompts)) == 36, "none finds its beginning in a pool"
    assert seen == [(i + 1, 12) for i in range(12)]
    assert [item.prompt_length for item in result.prompts] == [8, 16]
    assert result.read_bytes_per_s == 2e9
    for item in result.prompts:
        # All prompt tokens over the time to the first token: medians of reciprocals of few samples.
        low, high = (3 * item.prompt_length * 1e3 / ms for ms in reversed(item.ttft_ms.ci95))
        assert low <= item.prefill_tokens_per_s.median <= high
        for rate in (item.ttft_ms, item.prefill_tokens_per_s, item.decode_tokens_per_s):
            assert 0 < rate.ci95[0] <= rate.median <= rate.ci95[1]


def test_the_first_generation_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timed or not; a session says how many are not."""
    monkeypatch.setattr("optc.runtime.measuring.benchmark.read_bandwidth", lambda threads: 1e9)
    times = itertools.count(1)

    def timed(*_: object, **__: object) -> GenerationResult:
        return GenerationResult(tokens=[], stop=[], ttft_ms=float(next(times)), tpot_ms=1.0, steps=1)

    monkeypatch.setattr("optc.runtime.measuring.benchmark.generate", timed)
    (found,) = benchmark(Counting(), prompt_lengths=(8,), new_tokens=4, samples=3).prompts
    assert (found.first_ttft_ms, found.ttft_ms.median) == (1.0, 3.0)
    monkeypatch.setattr(Counting, "warm_up_calls", 2)
    (found,) = benchmark(Counting(), prompt_lengths=(8,), new_tokens=4, samples=3).prompts
    assert (found.first_ttft_ms, found.ttft_ms.median) == (5.0, 8.0)
    (found,) = benchmark(Counting(), prompt_lengths=(8,), new_tokens=4, samples=3, warmup=0).prompts
    assert (found.first_ttft_ms, found.ttft_ms.median) == (10.0, 11.0)


def test_median_and_interval() -> None:
    assert median_rate([3.0, 1.0, 2.0]).median == 2.0
    assert median_rate([5.0]).to_dict() == {"median": 5.0, "ci95": [5.0, 5.0]}
    # 101 values 0..100: a 95 % interval of the median is about 50 +- 1.96 * 100 / (2 * sqrt(101)) = 50 +- 10.
    low, high = median_rate([float(i) for i in range(101)]).ci95
    assert 38 <= low <= 43
    assert 57 <= high <= 62


def test_peak_rss_sees_an_allocation() -> None:
    before, now = peak_rss_bytes(), psutil.Process().memory_info().rss
    block = np.ones(before - now + (64 << 20), np.uint8)  # past the old peak, which lies above `now`
    assert 32 << 20 < peak_rss_bytes() - before < 128 << 20
    assert block.all()


def test_bandwidth_and_environment() -> None:
    assert 1e8 < read_bandwidth(1, 1 << 24) < 1e13
    found = environment(2)
    assert found["threads"] == 2
    assert "numpy" in found["versions"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch 0 is out of range"),
        ({"samples": 0}, "samples 0 is out of range"),
        ({"prompt_lengths": (8, 0)}, "prompt-length 0 is out of range"),
        ({"new_tokens": 1}, "new-tokens 1 is out of range"),
        ({"prompt_lengths": (60,), "new_tokens": 6}, "60 prompt and 6 new tokens do not fit the context"),
    ],
)
def test_refuses(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        benchmark(Counting(), **options)  # type: ignore[arg-type]
    assert caught.value.what == message
