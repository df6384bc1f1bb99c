"""Speed of several artifacts, sample by sample in turn: a slow phase of the machine hits all of them alike.

Rates are medians over samples; a ratio is the median over samples of an artifact's rate to the first one's of the same
turn. Both have a 95 % interval by the percentile bootstrap.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from optc.compiler.settings.fields import check_range
from optc.runtime.bounds import Samples
from optc.runtime.generation.generate import generate
from optc.runtime.measuring.benchmark import Rate, median_rate
from optc.runtime.sessions.session import Session

Sample = Callable[[], Mapping[str, float]]
"""One timed run: what was measured -> its rate; the more, the better."""


@dataclass(frozen=True)
class PairedSpeed:
    """What one artifact reached.

    Attributes:
        rates: by what was measured.
        ratios: the same over the first artifact's.
    """

    rates: Mapping[str, Rate]
    ratios: Mapping[str, Rate]

    def to_dict(self) -> dict[str, Any]:
        return {name: rate.to_dict() | {"to_first": self.ratios[name].to_dict()} for name, rate in self.rates.items()}


def speeds_in_turn(
    runs: Sequence[Sample],
    samples: int,
    *,
    warmup: int = 1,
    on_sample: Callable[[int, int], None] = lambda done, total: None,
) -> list[PairedSpeed]:
    """Time each run `samples` times, in turn, after untimed ones.

    Raises:
        UsageError: `samples` out of range.
    """
    check_range("samples", samples, Samples)
    total = (samples + warmup) * len(runs)
    table: list[list[Mapping[str, float]]] = [[] for _ in runs]
    for turn in range(samples + warmup):
        for number, run in enumerate(runs):
            table[number].append(run())
            on_sample(turn * len(runs) + number + 1, total)
    timed = [rows[warmup:] for rows in table]
    return [_paired(rows, timed[0]) for rows in timed]


def _paired(rows: Sequence[Mapping[str, float]], first: Sequence[Mapping[str, float]]) -> PairedSpeed:
    names = list(rows[0])
    return PairedSpeed(
        rates={name: median_rate([row[name] for row in rows]) for name in names},
        ratios={
            name: median_rate([row[name] / base[name] for row, base in zip(rows, first, strict=True)]) for name in names
        },
    )


def generating(session: Session, prompt_tokens: int, new_tokens: int) -> Sample:
    """A greedy generation after a random prompt, another one each time: tokens per second of prefill and decode."""
    rng = np.random.default_rng(0)

    def run() -> dict[str, float]:
        prompt = rng.integers(0, session.vocab_size, (1, prompt_tokens)).tolist()
        found = generate(session, prompt, max_new_tokens=new_tokens)
        assert found.tpot_ms is not None, "two tokens or more"
        return {"decode_tokens_per_s": 1e3 / found.tpot_ms, "prefill_tokens_per_s": prompt_tokens * 1e3 / found.ttft_ms}

    return run


def calling(call: Callable[[], object], rows: int) -> Sample:
    """A call of a model: rows per second."""

    def run() -> dict[str, float]:
        begin = time.perf_counter()
        call()
        return {"rows_per_s": rows / (time.perf_counter() - begin)}

    return run
