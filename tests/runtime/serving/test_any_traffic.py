"""Engines under any traffic: arrivals, cancellations, priorities, pools that are too small for what runs."""

from __future__ import annotations

import pytest
from context_model import VOCAB, context_model, continuation
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import Got, take

from optc.runtime.serving.device_runner import DeviceRunner
from optc.runtime.serving.engine_options import EngineOptions
from optc.runtime.serving.model_runner import HostRunner
from optc.runtime.serving.paged_engine import PagedEngine
from optc.runtime.serving.plan import Plan
from optc.runtime.serving.request import Generate


@st.composite
def arrivals(draw: st.DrawFn) -> list[tuple[int, Generate, int | None]]:
    """Requests with the step in which they come, and the one in which they are cancelled."""
    found = []
    for index in range(draw(st.integers(1, 9))):
        prompt = draw(st.lists(st.integers(0, 1), min_size=1, max_size=22))  # few tokens, so that prefixes repeat
        wanted = draw(st.integers(1, 14))
        item = Generate(
            id=str(index),
            prompt=prompt,
            max_new_tokens=wanted,
            priority=draw(st.integers(-1, 2)),
            stop_ids=draw(st.sampled_from([[], [*range(0, VOCAB, 9)]])),
        )
        begin = draw(st.integers(0, 12))
        cancelled = begin + draw(st.integers(0, 12)) if draw(st.integers(0, 3)) == 0 else None
        found.append((begin, item, cancelled))
    return found


@pytest.mark.parametrize("runner", [HostRunner, DeviceRunner])
@settings(max_examples=150, deadline=None)
@given(
    coming=arrivals(),
    num_blocks=st.integers(6, 14),
    max_running=st.integers(1, 8),
    budget=st.integers(1, 9),
    patience=st.integers(1, 4),
    steps=st.integers(1, 6),
)
def test_any_traffic(
    runner: type[HostRunner | DeviceRunner],
    coming: list[tuple[int, Generate, int | None]],
    num_blocks: int,
    max_running: int,
    budget: int,
    patience: int,
    steps: int,
) -> None:
    """Every answer is the one of the request alone; no block is left; no step is larger than its budget, and none of several
    launched at once is one with a prompt."""
    limit = max_running + budget
    options = EngineOptions(max_running=max_running, token_budget=limit, patience=patience)
    engine = PagedEngine(context_model(num_blocks), options, runner)
    if isinstance(engine._runner, DeviceRunner):
        engine._runner.pace.fix(steps)
    plans: list[Plan] = []
    launch = engine._runner.launch

    def launching(plan: Plan) -> None:
        plans.append(plan)
        for request in engine.scheduler.places.all():
            found = engine.scheduler.manager.length(request.id)
            assert found <= engine.scheduler.rows.known[request.row], "others find these: the host has read them"
        launch(plan)

    engine._runner.launch = launching  # type: ignore[method-assign]
    got: dict[str, Got] = {}
    for step in range(600):
        for begin, item, cancelled in coming:
            if begin == step:
                engine.submit(item)
            if cancelled == step:
                engine.cancel(item.id)
        take(got, engine.step())
        if step > 30 and engine.idle:
            break
    assert engine.idle
    assert engine.metrics().used_blocks == 0
    assert engine.scheduler.manager.free_blocks == num_blocks
    assert not engine.scheduler.places.late
    assert max((plan.tokens for plan in plans), default=0) <= limit
    assert not any(plan.pieces for plan in plans if plan.steps > 1)
    for _, item, cancelled in coming:
        room = num_blocks * 4 + 1 - len(item.prompt)
        expected = continuation(item.prompt, min(item.max_new_tokens, room), item.stop_ids)
        found = got[item.id]
        if found.finish == "cancelled":
            assert cancelled is not None
            assert found.tokens == expected[: len(found.tokens)]
        else:
            assert found.tokens == expected
            stopped = expected[-1] in item.stop_ids
            assert found.finish == ("stop" if stopped else "length" if item.max_new_tokens <= room else "context")
