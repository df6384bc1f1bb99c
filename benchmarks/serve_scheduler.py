"""The scheduler without a model: a heavy-tailed trace of requests through a pool that is too small for all that run.

    python benchmarks/serve_scheduler.py                    # 100 000 requests, some minutes
    python benchmarks/serve_scheduler.py --requests 2000    # a quick look

Prompts and answers are lognormal with a Pareto tail, priorities are 0 (80 %), 1 and -1, arrivals come in bursts, and a
third of the prompts begins with one of 20 common beginnings. A step takes 1 on the clock of the trace. Tokens are made up.

Waste is the share of slots of owned blocks that hold no token, over all steps. Overtaken is the number of first
admissions between a request's arrival and its own, against the bound of the scheduler's rule. A decision is a row or a
piece of a prompt in a step. Seconds are the scheduler's on the processor, without the trace and the arithmetic of this file.
"""

from __future__ import annotations

import argparse
import gc
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from optc.compiler.execution.block_manager import BlockManager
from optc.runtime.serving.plan import Chosen, Request
from optc.runtime.serving.rows import Rows
from optc.runtime.serving.scheduler import Scheduler

BLOCK, CONTEXT, BEGINNINGS = 16, 8192, 20


@dataclass
class Trace:
    """Requests by arrival, with the step in which each comes."""

    requests: list[Request]
    begins: list[int]


def make_trace(count: int, seed: int, load: float) -> Trace:
    """`load` is output tokens per step, of about 100 for each request."""
    rng = np.random.default_rng(seed)

    def lengths(median: float, most: int) -> Any:
        body = rng.lognormal(np.log(median), 0.9, count)
        tail = median * 8 * (1 + rng.pareto(1.3, count))
        return np.clip(np.where(rng.random(count) < 0.04, tail, body), 1, most).astype(int)

    inputs, outputs = lengths(220, 4000), lengths(100, 4000)
    common = [rng.integers(0, 30000, 160).tolist() for _ in range(BEGINNINGS)]
    gaps = rng.gamma(0.3, outputs.mean() / load / 0.3, count)  # bursts
    begins = np.cumsum(gaps).astype(int).tolist()
    priorities = rng.choice([0, 0, 0, 0, 0, 0, 0, 0, 1, -1], count).tolist()
    requests = []
    for index in range(count):
        prompt = rng.integers(0, 30000, inputs[index]).tolist()
        if index % 3 == 0:
            prompt = common[index % BEGINNINGS] + prompt
        requests.append(
            Request(
                id=str(index),
                tokens=prompt,
                prompt_length=len(prompt),
                end=len(prompt) + int(outputs[index]),
                end_reason="length",
                stops=[],
                priority=priorities[index],
            )
        )
    return Trace(requests, begins)


def simulate(trace: Trace, *, rows: int, num_blocks: int, budget: int, ahead: int, patience: int) -> dict[str, Any]:
    """Run a trace to its end."""
    scheduler = Scheduler(
        BlockManager(num_blocks, BLOCK),
        Rows(rows, CONTEXT, BLOCK),
        token_budget=budget,
        ahead=ahead,
        compact=ahead > 0,
        patience=patience,
    )
    state = scheduler.rows
    came: dict[str, tuple[int, int, int]] = {}
    waits: list[int] = []
    worst = 0.0
    ended = decisions = owned = empty = step = place = busy = 0
    seconds, longest = 0.0, 0.0
    left = len(trace.requests)
    unfinished: set[str] = set()
    plans: list[Any] = []
    while left or plans:
        while place < len(trace.requests) and trace.begins[place] <= step:
            request = trace.requests[place]
            came[request.id] = (step, len(unfinished), scheduler.counts.admissions)
            scheduler.add(request)
            unfinished.add(request.id)
            place += 1
        begin = time.process_time()
        plan = scheduler.plan()
        if plan is not None:
            plans.append(plan)
        gone = []
        if plans and (plan is None or len(plans) > ahead):
            oldest = plans.pop(0)
            gone = scheduler.collect(oldest, Chosen.one_each((oldest.rows * 7 + step) % 30000))
        took = time.process_time() - begin
        seconds, longest = seconds + took, max(longest, took)
        if plan is not None:
            assert plan.tokens <= budget
            busy += 1
            decisions += len(plan.decodes) + len(plan.pieces)
            slots = int(state.owned[_running(scheduler)].sum()) * BLOCK
            owned += slots
            empty += slots - int(state.fed[_running(scheduler)].sum())
            for piece in plan.pieces:
                name = scheduler.at(piece.row).id
                if name in came:
                    begun, before, admissions = came.pop(name)
                    waits.append(step - begun)
                    overtaken = scheduler.counts.admissions - 1 - admissions
                    worst = max(worst, overtaken / ((before + 1) * (patience + 1)))
        for item in gone:
            unfinished.discard(item.request.id)
            assert len(item.tokens) == item.request.end
        ended += len(gone)
        left -= len(gone)
        step += 1
        if plan is None and not plans and place < len(trace.requests):
            step = max(step, trace.begins[place])
    assert ended == len(trace.requests)
    assert scheduler.manager.used_blocks == 0
    counts = scheduler.counts
    return {
        "requests": len(trace.requests),
        "steps": busy,
        "output_tokens": counts.generated_tokens,
        "cached_share_of_prompts": counts.cached_tokens / counts.prompt_tokens,
        "preemptions": counts.preemptions,
        "rows_per_step": decisions / busy,
        "kv_waste": empty / owned,
        "wait_steps": {f"p{q}": float(np.percentile(waits, q)) for q in (50, 90, 99, 100)},
        "overtaken_of_bound": worst,
        "seconds": seconds,
        "us_per_step": seconds / busy * 1e6,
        "longest_step_ms": longest * 1e3,
        "decisions_per_s": decisions / seconds,
    }


def _running(scheduler: Scheduler) -> Any:
    return np.array([scheduler.places.find(row) is not None for row in range(scheduler.rows.count)])


def main() -> None:
    """Simulate, print and record."""
    from common import record

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=8192, help="of 16 tokens")
    parser.add_argument("--budget", type=int, default=2048)
    parser.add_argument("--ahead", type=int, default=1, help="1: tokens are read one step late, as on a GPU")
    parser.add_argument("--patience", type=int, default=256)
    parser.add_argument("--load", type=float, default=200, help="output tokens that arrive per step")
    given = parser.parse_args()
    trace = make_trace(given.requests, 0, given.load)
    gc.collect()
    gc.freeze()
    result = simulate(
        trace,
        rows=given.rows,
        num_blocks=given.blocks,
        budget=given.budget,
        ahead=given.ahead,
        patience=given.patience,
    )
    name = "serve_scheduler" if given.requests == 100_000 else "serve_scheduler_small"
    record(name, {"settings": vars(given), **result}, 1)


if __name__ == "__main__":
    main()
