"""Load on a server: requests that come at a rate, or as many as are to be open at once."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from optc.compiler.diagnostics import InputError
from optc.runtime.measuring.load.http_client import Client, Timing
from optc.runtime.measuring.load.workload import Workload

_PERCENTILES = (50, 90, 99)

OnRequest = Callable[[int, int], None]
"""Called with (answered so far, all) as requests end."""


@dataclass(frozen=True, kw_only=True)
class Slo:
    """What a good answer keeps to, in milliseconds; None where it may take any time."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None

    def kept(self, timing: Timing) -> bool:
        """Whether the request was answered as it should be."""
        late = self.ttft_ms is not None and timing.ttft * 1e3 > self.ttft_ms
        slow = self.tpot_ms is not None and timing.tpot is not None and timing.tpot * 1e3 > self.tpot_ms
        return not (timing.error or late or slow)


async def closed_loop(
    url: str, key: str, workload: Workload, *, count: int, concurrency: int, warmup: int = 0, on_request: OnRequest
) -> list[Timing]:
    """`count` requests, `concurrency` of them open at any time. Those of the warm-up come before and are not counted."""
    bodies = deque(workload.bodies(warmup + count))
    found: list[Timing] = []

    async def client() -> None:
        connection = Client(url, key)
        while bodies:
            number = warmup + count - len(bodies)
            timing = await _ask(connection, workload)(bodies.popleft(), time.perf_counter())
            if number >= warmup:
                found.append(timing)
                on_request(len(found), count)
        connection.close()

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return found


async def open_loop(
    url: str, key: str, workload: Workload, *, count: int, rate: float, warmup: int = 0, on_request: OnRequest
) -> list[Timing]:
    """`count` requests that come at `rate` a second, however many are open; see `closed_loop` for the warm-up."""
    bodies, arrivals = workload.bodies(warmup + count), workload.arrivals(warmup + count, rate)
    found: list[Timing] = []
    idle: list[Client] = []
    begin = time.perf_counter()

    async def request(body: bytes, due: float, counted: bool) -> None:
        connection = idle.pop() if idle else Client(url, key)
        timing = await _ask(connection, workload)(body, due)
        idle.append(connection)
        if counted:
            found.append(timing)
            on_request(len(found), count)

    async with asyncio.TaskGroup() as group:
        for number, (body, at) in enumerate(zip(bodies, arrivals, strict=True)):
            due = begin + at
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            group.create_task(request(body, due, number >= warmup))
    for connection in idle:
        connection.close()
    return found


def _ask(client: Client, workload: Workload) -> Callable[[bytes, float], Awaitable[Timing]]:
    return client.embed if workload.embeds else client.complete


def figures(timings: Sequence[Timing], slo: Slo) -> dict[str, Any]:
    """What the clients saw: latencies in ms with 95 % intervals, rates per second. Embeddings have no output tokens.

    Raises:
        InputError: no request was answered.
    """
    good = [item for item in timings if not item.error]
    if not good:
        error = timings[0].error if timings else "none was sent"
        raise InputError("no request was answered", why=error, remedy="see whether the server takes such requests")
    seconds = max(item.last for item in good) - min(item.due for item in timings)
    tokens = sum(item.tokens for item in good)
    return {
        "requests": len(timings),
        "failed": len(timings) - len(good),
        "first_error": next((item.error for item in timings if item.error), None),
        "seconds": seconds,
        "prompt_tokens": sum(item.prompt_tokens for item in good),
        "output_tokens": tokens,
        "requests_per_s": len(good) / seconds,
        "prompt_tokens_per_s": sum(item.prompt_tokens for item in good) / seconds,
        "output_tokens_per_s": tokens / seconds,
        "goodput_requests_per_s": sum(map(slo.kept, good)) / seconds,
        "ttft_ms": percentiles([item.ttft * 1e3 for item in good if item.tokens]),
        "tpot_ms": percentiles([item.tpot * 1e3 for item in good if item.tpot is not None]),
        "gap_ms": percentiles([gap * 1e3 for item in good for gap in item.gaps]),
        "e2e_ms": percentiles([item.total * 1e3 for item in good]),
    }


def percentiles(values: Sequence[float]) -> dict[str, Any] | None:
    """p50, p90, p99 and their 95 % bootstrap intervals; None where there is no value.

    A resample's quantile lies below the k-th value as often as a binomial count reaches k, so the interval is that
    between two of the sorted values, without drawing (Efron 1979, section 3; the binomial by its normal limit).
    """
    if not values:
        return None
    data = np.sort(np.asarray(values, np.float64))
    found: dict[str, Any] = {"mean": float(data.mean())}
    for percent in _PERCENTILES:
        share = percent / 100
        spread = 1.96 * np.sqrt(len(data) * share * (1 - share))
        ranks = np.rint(len(data) * share + np.array([-spread, spread])).astype(int)
        low, high = data[np.clip(ranks, 1, len(data)) - 1]
        found[f"p{percent}"] = {"value": float(np.percentile(data, percent)), "ci95": [float(low), float(high)]}
    return found
