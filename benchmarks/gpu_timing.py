"""Time of GPU work in captured graphs, and what the card's memory can be read at, for the benchmarks of kernels."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl

ROUNDS = 9


def graph_of(calls: Sequence[Callable[[], Any]], *, warm: bool = True) -> torch.cuda.CUDAGraph:
    """One CUDA graph of all calls, in order; `warm` runs each once before, which compiles its kernels."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls if warm else ():
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def replay_time(graph: torch.cuda.CUDAGraph, rounds: int = ROUNDS) -> float:
    """Seconds of one replay, the median of `rounds` after two for warming up."""
    times = []
    for turn in range(rounds + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if turn >= 2:
            times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def time_per_call(calls: Sequence[Callable[[], Any]], rounds: int = ROUNDS) -> float:
    """Seconds per call of a graph of all `calls`, which should read other memory each, more than a cache holds."""
    return replay_time(graph_of(calls), rounds) / len(calls)


@triton.jit  # type: ignore[untyped-decorator]
def _read(source, sink, BLOCK: tl.constexpr, STEPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Read STEPS * BLOCK words per program; what is written depends on all of them, so that none is left out."""
    first = tl.program_id(0).to(tl.int64) * STEPS * BLOCK
    lane = tl.arange(0, BLOCK)
    mixed = tl.zeros([BLOCK], tl.int32)
    for step in tl.static_range(STEPS):
        mixed ^= tl.load(source + first + step * BLOCK + lane, eviction_policy="evict_first")
    tl.store(sink + lane, mixed, mask=mixed == 0x12345678)


def read_ceiling(gigabytes: float = 4.0) -> float:
    """Bytes per second of the fastest of some streaming kernels over `gigabytes`."""
    words = int(gigabytes * 1e9 / 4) // 2**16 * 2**16
    source = torch.randint(-(2**31), 2**31 - 1, (words,), dtype=torch.int32, device="cuda")
    sink = torch.zeros(4096, dtype=torch.int32, device="cuda")
    times = []
    for block, steps, warps in ((1024, 8, 4), (2048, 4, 4), (2048, 8, 8), (4096, 4, 8), (1024, 16, 4)):
        grid = (words // (block * steps),)
        graph = graph_of([functools.partial(_read[grid], source, sink, block, steps, num_warps=warps)])
        times.append(replay_time(graph))
    return words * 4 / min(times)


def card() -> dict[str, Any]:
    """The GPU and what ran on it, for a record."""
    return {
        "gpu": torch.cuda.get_device_name(),
        "memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
    }
