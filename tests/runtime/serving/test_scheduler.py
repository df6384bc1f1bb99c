"""The scheduler without a model: its order, its rule against starvation, and a heavy-tailed trace."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optc.compiler.execution.block_manager import BlockManager
from optc.runtime.serving.plan import Chosen, Request
from optc.runtime.serving.request import Finish
from optc.runtime.serving.rows import Rows
from optc.runtime.serving.scheduler import Scheduler

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


def scheduler(*, blocks: int = 100, rows: int = 2, budget: int = 16, patience: int = 5) -> Scheduler:
    return Scheduler(BlockManager(blocks, 4), Rows(rows, 64, 4), token_budget=budget, patience=patience)


def add(target: Scheduler, name: str, length: int, count: int, priority: int = 0) -> None:
    reason: Finish = "length"
    tokens = [50 * sum(name.encode()) + i for i in range(length)]
    target.add(
        Request(
            id=name,
            tokens=tokens,
            prompt_length=length,
            end=length + count,
            end_reason=reason,
            stops=[],
            priority=priority,
        )
    )


def step(target: Scheduler) -> tuple[list[str], list[str], list[str]]:
    """Plan and collect; the requests that decode, those whose prompts are fed, and those that end."""
    plan = target.plan()
    if plan is None:
        return [], [], []
    decodes = [target.at(row).id for row in plan.decodes.tolist()]
    pieces = [f"{target.at(piece.row).id}+{piece.size}" for piece in plan.pieces]
    ended = target.collect(plan, Chosen.one_each(np.full(len(plan.rows), 1)))
    return decodes, pieces, [item.request.id for item in ended]


def run(target: Scheduler) -> Iterator[tuple[list[str], list[str], list[str]]]:
    while target.running or target.waiting:
        yield step(target)


def test_prompts_are_fed_in_what_answers_leave_of_the_budget() -> None:
    target = scheduler(budget=10, rows=3)
    add(target, "a", 4, 6)
    add(target, "b", 23, 2)
    assert step(target) == ([], ["a+4", "b+6"], [])
    assert step(target) == (["a"], ["b+9"], [])
    add(target, "c", 3, 1)
    assert step(target) == (["a"], ["b+8", "c+1"], [])
    assert step(target) == (["a", "b"], ["c+2"], ["b", "c"])


def test_smaller_priorities_go_first_and_equal_ones_in_order() -> None:
    target = scheduler(rows=1)
    for name, priority in (("a", 1), ("b", 0), ("c", 1), ("d", -1), ("e", 0)):
        add(target, name, 2, 1, priority)
    assert [ended for _, _, ended in run(target)] == [["d"], ["b"], ["e"], ["a"], ["c"]]


def test_the_first_that_does_not_fit_keeps_others_waiting() -> None:
    target = scheduler(blocks=8, rows=3, budget=40)
    add(target, "a", 14, 10)
    add(target, "b", 15, 1)
    add(target, "c", 2, 1)
    assert step(target) == ([], ["a+14"], [])
    order = [ended for _, _, ended in run(target) if ended]
    assert order == [["a"], ["b", "c"]]


def test_the_last_in_order_gives_way() -> None:
    """Not the one that came last."""
    target = scheduler(blocks=8, rows=2, budget=40)
    add(target, "low", 8, 12, priority=1)
    add(target, "first", 8, 12)
    seen = list(run(target))
    assert target.counts.preemptions == 1
    assert [ended for _, _, ended in seen if ended] == [["first"], ["low"]]
    assert target.counts.generated_tokens == 24
    assert target.manager.used_blocks == 0


def test_no_flood_of_better_ones_starves_a_request() -> None:
    """Of one row, with a better request always at hand: overtaken as often as patience says, no more."""
    target = scheduler(rows=1, patience=5)
    add(target, "poor", 2, 1, priority=9)
    ended: list[str] = []
    for index in range(20):
        add(target, f"rich {index}", 2, 1)
        ended += step(target)[2]
    assert ended.index("poor") == 5


def test_what_is_urgent_gives_way_last() -> None:
    target = scheduler(blocks=8, rows=2, budget=20, patience=1)
    add(target, "poor", 8, 12, priority=9)
    add(target, "rich 0", 2, 1)
    step(target)
    add(target, "rich 1", 8, 12)
    order = [ended for _, _, ended in run(target) if ended]
    assert target.counts.preemptions == 1
    assert order == [["poor"], ["rich 1"]]


@pytest.fixture(scope="module")
def simulation() -> Any:
    spec = importlib.util.spec_from_file_location("serve_scheduler", BENCHMARKS / "serve_scheduler.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["serve_scheduler"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_heavy_tailed_trace(simulation: Any, ahead: int) -> None:
    """Nobody starves, nothing is left, next to no slot is empty; the pool is too small for all rows."""
    trace = simulation.make_trace(150, 1, 40.0)
    result = simulation.simulate(trace, rows=48, num_blocks=600, budget=256, ahead=ahead, patience=8)
    assert result["preemptions"] > 0
    assert 0 < result["overtaken_of_bound"] <= 1
    assert result["kv_waste"] < 0.04
    assert result["output_tokens"] == sum(item.end - item.prompt_length for item in trace.requests)
