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


def planned(target: Scheduler, most: int) -> int:
    """Plan and collect; the steps of the plan."""
    plan = target.plan(most)
    assert plan is not None
    target.collect(plan, Chosen(np.full((len(plan.rows), plan.steps), 1), np.full(len(plan.rows), plan.steps)))
    return plan.steps


def test_steps_follow_each_other_while_no_prompt_can_be_fed() -> None:
    target = scheduler(rows=2, budget=10)
    add(target, "a", 13, 30)
    assert [planned(target, 4) for _ in range(3)] == [1, 1, 4]
    add(target, "b", 3, 7)
    assert [planned(target, 4) for _ in range(2)] == [1, 4]
    add(target, "c", 3, 1)
    assert [planned(target, 4) for _ in range(3)] == [2, 1, 4], "b ends with its steps, as c waits for its place"


def test_a_row_that_ends_among_steps_computes_on_in_its_slots() -> None:
    target = scheduler(rows=2, budget=20)
    add(target, "a", 4, 30)
    add(target, "b", 4, 3)
    assert planned(target, 8) == 1
    plan = target.plan(8)
    assert plan is not None
    assert plan.steps == 4, "b wants 2, and its second block has 4 slots"
    ended = target.collect(plan, Chosen(np.arange(8).reshape(2, 4), np.full(2, 4)))
    assert [(item.request.id, item.tokens[4:]) for item in ended] == [("b", [1, 4, 5])]
    assert planned(target, 8) == 8


def test_nobody_gives_way_for_steps_that_follow() -> None:
    """Each of two rows needs a block for its next four tokens, and one is free."""
    target = scheduler(blocks=5, rows=2, budget=20)
    add(target, "a", 6, 14)
    add(target, "b", 7, 14)
    assert [planned(target, 4) for _ in range(3)] == [1, 1, 1], "the prompts, and slots that both have"
    assert (target.counts.preemptions, target.manager.used_blocks) == (0, 5)
    assert planned(target, 4) == 4, "b has given way for the next token of a"
    assert target.counts.preemptions == 1


def test_tokens_of_several_steps_come_to_one_that_gave_way() -> None:
    """It gives way while they are under way, and ends with the stop token among them."""
    target = Scheduler(BlockManager(6, 4), Rows(2, 64, 4), token_budget=20, ahead=1)
    add(target, "a", 8, 12)
    add(target, "b", 7, 12)
    target.progress.requests["b"].stops = [9]
    prompts, steps = target.plan(4), target.plan(4)
    assert prompts is not None
    assert steps is not None
    assert (steps.steps, len(steps.rows)) == (3, 2), "a has three slots and one for the step behind them"
    target.collect(prompts, Chosen.one_each(np.array([1, 2])))
    further = target.plan(4)
    assert further is not None
    assert (further.steps, len(further.rows), target.counts.preemptions) == (4, 1, 1)
    ended = target.collect(steps, Chosen(np.array([[3, 4, 5], [6, 9, 7]]), np.full(2, 3)))
    assert [(item.request.id, item.tokens[7:], item.finish) for item in ended] == [("b", [2, 6, 9], "stop")]
    assert not target.places.late


def test_a_row_is_another_requests_while_its_last_token_is_chosen() -> None:
    target = Scheduler(BlockManager(6, 4), Rows(1, 64, 4), token_budget=8, ahead=1)
    for name in "abc":
        add(target, name, 5, 2)
    prompt, last = target.plan(), target.plan()
    assert prompt is not None
    assert last is not None
    assert target.collect(prompt, Chosen.one_each(np.array([1]))) == []
    following = target.plan()
    assert following is not None
    assert [piece.row for piece in following.pieces] == [0], "the prompt of b, before the last token of a is read"
    assert [target.at(0).id, target.running, target.waiting] == ["b", 1, 1]
    (ended,) = target.collect(last, Chosen.one_each(np.array([2])))
    assert (ended.request.id, ended.tokens[5:], ended.finish, target.waiting) == ("a", [1, 2], "length", 1)
    of_b = target.plan()
    assert of_b is not None
    assert target.collect(following, Chosen.one_each(np.array([3]))) == []
    assert target.plan() is not None, "c has the row"
    cancelled = target.cancel("b")
    assert cancelled is not None
    assert (cancelled.tokens[5:], target.waiting) == ([3], 0)
    add(target, "b", 5, 2)
    assert target.collect(of_b, Chosen.one_each(np.array([4]))) == [], "it is not the new request of this name"
    assert not target.places.late


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
