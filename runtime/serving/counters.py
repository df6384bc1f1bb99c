"""Counters of all processes of a server in one mapped file, and their text for Prometheus.

Each API process has a row of float64 and is the only one that writes it, so a counter needs no lock; whoever is asked
for the metrics adds the rows up. They outlive a process that is restarted.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from optc.runtime.serving.request import EngineInfo, EngineMetrics
from optc.runtime.speculative.figures import SpeculativeFigures

STATUSES = (200, 400, 401, 403, 404, 405, 408, 413, 415, 429, 431, 499, 500, 503, 504)
"""Of answers; 499 is a client that left before its answer."""

_LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


@dataclass(frozen=True)
class Histogram:
    """A place in the rows: a count for each bound, one beyond them, and the sum."""

    name: str
    help: str
    start: int
    bounds: tuple[float, ...]

    @property
    def end(self) -> int:
        return self.start + len(self.bounds) + 2


TTFT = Histogram(
    "optc_time_to_first_token_seconds", "From a request's arrival to its first token.", len(STATUSES), _LATENCY
)
TPOT = Histogram(
    "optc_time_per_output_token_seconds", "Mean of an answer, after its first token.", TTFT.end, _PER_TOKEN
)
TOTAL = Histogram("optc_request_seconds", "From a request's arrival to its last token.", TPOT.end, _LATENCY)
_STARTS = TOTAL.end  # of the engine's process; the supervisor writes it, in the row behind those of the workers
_WIDTH = _STARTS + 1


class Counters:
    """The mapped file. `row` is this process's own."""

    def __init__(self, path: Path, row: int) -> None:
        with open(path, "r+b") as file:
            self._map = mmap.mmap(file.fileno(), 0)
        self._rows = np.frombuffer(self._map, dtype=np.float64).reshape(-1, _WIDTH)
        self._own = self._rows[row]

    @staticmethod
    def create(path: Path, workers: int) -> None:
        """Write a file of zeros: a row for each API process, and the supervisor's."""
        path.write_bytes(bytes((workers + 1) * _WIDTH * 8))

    def count_status(self, status: int) -> None:
        """An answer with this status was given."""
        self._own[STATUSES.index(status)] += 1

    def count_start(self) -> None:
        """The engine's process was started."""
        self._own[_STARTS] += 1

    def observe(self, histogram: Histogram, seconds: float) -> None:
        """Note a value."""
        self._own[histogram.start + int(np.searchsorted(histogram.bounds, seconds))] += 1
        self._own[histogram.end - 1] += seconds

    def text(self, info: EngineInfo | None, metrics: EngineMetrics | None) -> str:
        """Prometheus's text format 0.0.4. The engine's own are left out where it does not run."""
        sums = self._rows.sum(axis=0)
        lines = [
            *_header("optc_engine_up", "gauge", "Whether the engine runs."),
            f"optc_engine_up {int(info is not None)}",
        ]
        lines += _header("optc_engine_starts_total", "counter", "Starts of the engine's process.")
        lines.append(f"optc_engine_starts_total {sums[_STARTS]:.0f}")
        lines += _header("optc_requests_total", "counter", "Answers by HTTP status; 499: the client left before.")
        lines += [f'optc_requests_total{{status="{code}"}} {sums[i]:.0f}' for i, code in enumerate(STATUSES)]
        for histogram in (TTFT, TPOT, TOTAL):
            lines += _histogram(histogram, sums[histogram.start : histogram.end])
        if info is not None and metrics is not None:
            lines += _engine(info, metrics)
        return "\n".join(lines) + "\n"


def _header(name: str, kind: str, text: str) -> list[str]:
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]


def _histogram(histogram: Histogram, values: Sequence[float]) -> Iterator[str]:
    yield from _header(histogram.name, "histogram", histogram.help)
    total = 0.0
    for bound, count in zip((*histogram.bounds, "+Inf"), values, strict=False):
        total += count
        yield f'{histogram.name}_bucket{{le="{bound}"}} {total:.0f}'
    yield f"{histogram.name}_sum {values[-1]:.9g}"
    yield f"{histogram.name}_count {total:.0f}"


def _engine(info: EngineInfo, metrics: EngineMetrics) -> Iterator[str]:
    rows = (
        ("optc_requests_running", "gauge", "Requests in the engine's steps.", metrics.running),
        ("optc_requests_waiting", "gauge", "Requests that wait for their turn.", metrics.waiting),
        ("optc_requests_running_limit", "gauge", "Most requests that run together.", info.max_running),
        ("optc_kv_blocks", "gauge", "Blocks of the KV pool; 0 where the cache is not paged.", info.num_blocks),
        ("optc_kv_blocks_used", "gauge", "Blocks that requests hold.", metrics.used_blocks),
        ("optc_engine_steps_total", "counter", "Steps of the model.", metrics.steps),
        ("optc_prompt_tokens_total", "counter", "Tokens of prompts.", metrics.prompt_tokens),
        ("optc_cached_prompt_tokens_total", "counter", "Of them, found in the KV pool.", metrics.cached_tokens),
        ("optc_generated_tokens_total", "counter", "Tokens of answers.", metrics.generated_tokens),
        ("optc_preemptions_total", "counter", "Requests that lost their blocks and ran again.", metrics.preemptions),
        (
            "optc_engine_host_seconds_per_step",
            "gauge",
            "Time of a step that is not the model's.",
            f"{metrics.host_us_per_step / 1e6:.9g}",
        ),
    )
    for name, kind, text, value in rows:
        yield from _header(name, kind, text)
        yield f"{name} {value}"
    yield from _header("optc_engine_finished_total", "counter", "Requests that ended in the engine, by reason.")
    for reason, count in sorted(metrics.finished.items()):
        yield f'optc_engine_finished_total{{reason="{reason}"}} {count}'
    if metrics.speculation is not None:
        yield from _speculative(metrics.speculation)


def _speculative(figures: SpeculativeFigures) -> Iterator[str]:
    for name, kind, text, value in (
        ("optc_draft_depth", "gauge", "Tokens drafted in a step; 0 where plain decoding is faster.", figures.depth),
        ("optc_draft_tree", "gauge", "Guesses of the tree that is drafted; 0 where it is a chain.", figures.tree),
        (
            "optc_draft_verified_total",
            "counter",
            "Drafts that were verified, one a step and request.",
            figures.verified,
        ),
        ("optc_draft_seconds_total", "counter", "Time of the drafter.", f"{figures.draft_seconds:.9g}"),
    ):
        yield from _header(name, kind, text)
        yield f"{name} {value}"
    if figures.speedup is not None:
        yield from _header("optc_draft_speedup", "gauge", "Of the last steps with drafts, against plain ones.")
        yield f"optc_draft_speedup {figures.speedup:.6g}"
    for name, text, counts in (
        (
            "optc_draft_tokens_total",
            "Drafted tokens that were verified, by their place in the draft.",
            figures.drafted_at,
        ),
        ("optc_draft_accepted_tokens_total", "Of them, accepted.", figures.accepted_at),
    ):
        yield from _header(name, "counter", text)
        yield from (f'{name}{{position="{place}"}} {count}' for place, count in enumerate(counts))
