"""Speed and memory of a session: TTFT, prefill and decode rates, peak RSS, read bandwidth.

Each sample is one generation from an empty cache, of a prompt that is in no pool. TTFT runs from the call to the first token chosen;
prefill tokens/s are all prompt tokens over that time; decode tokens/s are batch rows times steps
over the time of the steps after the first token. Rates are medians over samples with a 95 % interval
by the percentile bootstrap (Efron 1979) with a fixed seed.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from optc.compiler.diagnostics import UsageError
from optc.compiler.settings.fields import check_range
from optc.compiler.version import version_of
from optc.runtime.bounds import Batch, Count, Samples, TimedTokens, Warmup
from optc.runtime.generation.generate import GenerationResult, generate
from optc.runtime.sampling import Sampling
from optc.runtime.sessions.session import Session

_RESAMPLES = 2000
_BANDWIDTH_BYTES = 1 << 29
_LIBRARIES = ("optc", "onnxruntime", "torch", "numpy")


@dataclass(frozen=True)
class Rate:
    """A median and its 95 % interval."""

    median: float
    ci95: tuple[float, float]

    def to_dict(self) -> dict[str, Any]:
        return {"median": self.median, "ci95": list(self.ci95)}


@dataclass(frozen=True)
class PromptSpeed:
    """Speed from an empty cache at one prompt length.

    Attributes:
        first_ttft_ms: of the first generation of that length, in which an engine may compile.
    """

    prompt_length: int
    first_ttft_ms: float
    ttft_ms: Rate
    prefill_tokens_per_s: Rate
    decode_tokens_per_s: Rate


@dataclass(frozen=True)
class Benchmark:
    """All of it; `prompts` has one entry per prompt length, in the order asked for.

    Attributes:
        read_bytes_per_s: of the memory of the device that computes.
        gpu: its name; "" where the processor computes.
    """

    batch: int
    new_tokens: int
    sampling: Sampling
    samples: int
    prompts: tuple[PromptSpeed, ...]
    peak_rss_bytes: int
    read_bytes_per_s: float
    gpu: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The figures as JSON; those of the first prompt length stand at the top as well."""
        rows = [
            {
                "prompt_tokens": item.prompt_length,
                "ttft_ms": item.ttft_ms.to_dict(),
                "first_ttft_ms": item.first_ttft_ms,
                "prefill_tokens_per_s": item.prefill_tokens_per_s.to_dict(),
                "decode_tokens_per_s": item.decode_tokens_per_s.to_dict(),
            }
            for item in self.prompts
        ]
        return {
            **rows[0],
            "peak_rss_bytes": self.peak_rss_bytes,
            "samples": self.samples,
            "batch": self.batch,
            "new_tokens": self.new_tokens,
            "sampling": asdict(self.sampling),
            "read_bytes_per_s": self.read_bytes_per_s,
            "gpu": self.gpu,
            "prompts": rows,
        }


def benchmark(
    session: Session,
    *,
    prompt_lengths: Sequence[int] = (128, 512),
    new_tokens: int = 64,
    sampling: Sampling | None = None,
    batch: int = 1,
    samples: int = 5,
    warmup: int | None = None,
    threads: int = 1,
    on_sample: Callable[[int, int], None] = lambda done, total: None,
) -> Benchmark:
    """Time a session on random prompts (fixed seed), no two of them alike, without stop tokens.

    Prompt lengths take turns, so that a slow phase of the machine hits all of them alike.

    Args:
        sampling: how tokens are chosen; None is greedy.
        warmup: untimed generations per prompt length; None: as many as the session needs.
        threads: of the bandwidth measurement.
        on_sample: called with (done, total) after each generation.

    Raises:
        UsageError: a count that is out of range, or more tokens than the context holds.
    """
    _check(session, prompt_lengths, new_tokens, batch, samples, warmup or 0)
    warmup = session.warm_up_calls if warmup is None else warmup
    rng = np.random.default_rng(0)
    runs: dict[int, list[GenerationResult]] = {n: [] for n in prompt_lengths}
    total, done = (samples + warmup) * len(runs), 0
    for _ in range(samples + warmup):
        for length, results in runs.items():
            rows = rng.integers(0, session.vocab_size, (batch, length)).tolist()
            results.append(generate(session, rows, max_new_tokens=new_tokens, sampling=sampling))
            done += 1
            on_sample(done, total)
    peak = peak_rss_bytes()  # before the bandwidth measurement takes memory of its own
    return Benchmark(
        batch=batch,
        new_tokens=new_tokens,
        sampling=sampling or Sampling(),
        samples=samples,
        prompts=tuple(_speed(length, batch, results, warmup) for length, results in runs.items()),
        peak_rss_bytes=peak,
        read_bytes_per_s=session.read_bandwidth() or read_bandwidth(threads),
        gpu=session.device_name,
    )


def _check(
    session: Session, prompt_lengths: Sequence[int], new_tokens: int, batch: int, samples: int, warmup: int
) -> None:
    check_range("batch", batch, Batch)
    check_range("samples", samples, Samples)
    check_range("warmup", warmup, Warmup)
    check_range("new-tokens", new_tokens, TimedTokens)
    for length in prompt_lengths or (0,):
        check_range("prompt-length", length, Count)
    longest = max(prompt_lengths) + new_tokens - 1
    if longest > session.context_length:
        raise UsageError(
            f"{max(prompt_lengths)} prompt and {new_tokens} new tokens do not fit the context",
            why=f"it holds {session.context_length} tokens",
            remedy="use a smaller --prompt-length or --new-tokens",
        )


def _speed(length: int, batch: int, results: Sequence[GenerationResult], warmup: int) -> PromptSpeed:
    timed = results[warmup:]
    ttft = [result.ttft_ms for result in timed]
    decode = [batch * 1e3 / result.tpot_ms for result in timed if result.tpot_ms]
    return PromptSpeed(
        prompt_length=length,
        first_ttft_ms=results[0].ttft_ms,
        ttft_ms=median_rate(ttft),
        prefill_tokens_per_s=median_rate([batch * length * 1e3 / ms for ms in ttft]),
        decode_tokens_per_s=median_rate(decode),
    )


def median_rate(values: Sequence[float]) -> Rate:
    """The median with its 95 % percentile-bootstrap interval (2000 resamples, seed 0)."""
    data = np.asarray(values, np.float64)
    picks = np.random.default_rng(0).integers(0, len(data), (_RESAMPLES, len(data)))
    low, high = np.percentile(np.median(data[picks], axis=1), [2.5, 97.5])
    return Rate(float(np.median(data)), (float(low), float(high)))


def read_bandwidth(threads: int, size: int = _BANDWIDTH_BYTES) -> float:
    """Bytes per second that `threads` threads read from memory together.

    Decoding one row reads every weight once per token, so this over the weight bytes is the limit
    of its speed.
    """
    parts = np.array_split(np.ones(size // 8, np.float64), threads)
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            begin = time.perf_counter()
            list(pool.map(np.max, parts))
            best = min(best, time.perf_counter() - begin)
    return sum(part.nbytes for part in parts) / best


def peak_rss_bytes() -> int:
    """The largest resident size of this process so far.

    On Linux VmHWM, because `ru_maxrss` counts what the parent held before exec as well.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak_wset = getattr(psutil.Process().memory_info(), "peak_wset", None)  # Windows
    if peak_wset is not None:
        return int(peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def environment(threads: int) -> dict[str, Any]:
    """What the figures depend on beside the artifact: processor, threads, library versions."""
    versions = {name: version_of(name) for name in _LIBRARIES}
    found = {name: version for name, version in versions.items() if version}
    return {
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "threads": threads,
        "memory_bytes": psutil.virtual_memory().total,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": found,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
