"""The runner of the CUDA target on the CPU, with recordings in place of graphs, against sessions of one row."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from cuda_sessions import LENGTHS, MIXED, PENALIZED, compiled
from recorded_calls import Recordings
from serving import Got, run, take
from stages import sequences

from optc.runtime.generation.generate import generate
from optc.runtime.sampling import Sampling
from optc.runtime.serving import device_runner
from optc.runtime.serving.device_runner import DeviceRunner
from optc.runtime.serving.engine import engine_for
from optc.runtime.serving.engine_options import EngineOptions
from optc.runtime.serving.pace import Pace
from optc.runtime.serving.paged_engine import PagedEngine
from optc.runtime.serving.request import Generate
from optc.runtime.sessions.cuda import CudaSession
from optc.runtime.sessions.cuda_memory import MemoryPlan

COUNT = 12


def session(record: Recordings | None = None) -> CudaSession:
    plan = MemoryPlan(weights=0, working=0, pool=0, num_blocks=16, prompt_tokens=256)
    return CudaSession(compiled(), plan, record=record)


def engine(record: Recordings | None = None, **options: int) -> PagedEngine:
    settings = {"max_running": 4, "token_budget": 64, **options}
    made = engine_for(session(record), EngineOptions(**settings))  # type: ignore[arg-type]
    assert isinstance(made, PagedEngine)
    assert isinstance(made._runner, DeviceRunner)
    return made


def pace(served: PagedEngine) -> Pace:
    assert isinstance(served._runner, DeviceRunner)
    return served._runner.pace


def planned(served: PagedEngine) -> list[int]:
    """The steps of each plan that is launched from now on."""
    found: list[int] = []
    launch = served._runner.launch
    served._runner.launch = lambda plan: (found.append(plan.steps), launch(plan))[1]  # type: ignore[method-assign]
    return found


@functools.cache
def alone(place: int, sampling: Sampling) -> list[int]:
    """What a session of one row generates."""
    return generate(session(), [sequences(*LENGTHS)[place]], max_new_tokens=COUNT, sampling=sampling).tokens[0]


def requests(samplings: list[Sampling], **others: object) -> list[Generate]:
    return [
        Generate(id=str(i), prompt=prompt, max_new_tokens=COUNT, sampling=sampling, **others)  # type: ignore[arg-type]
        for i, (prompt, sampling) in enumerate(zip(sequences(*LENGTHS), samplings, strict=True))
    ]


@pytest.mark.parametrize("samplings", [[Sampling()] * 3, MIXED, PENALIZED, [*MIXED[:2], PENALIZED[0]]])
def test_recorded_steps_give_what_each_request_gets_alone(samplings: list[Sampling]) -> None:
    """Those that come later meet steps and calls that were recorded without them. The second time three steps follow each
    other at a time."""
    record = Recordings()
    served = engine(record)
    steps = planned(served)
    got: dict[str, Got] = {}
    for turn in range(2):
        pace(served).fix(1 + 2 * turn)
        for item in requests(samplings):
            served.submit(item)
            for _ in range(2):
                take(got, served.step())
        run(served, got=got)
        assert [got[str(i)].tokens for i in range(3)] == [alone(i, sampling) for i, sampling in enumerate(samplings)]
        if not turn:
            assert set(steps) == {1}
            got = {}
    assert set(steps) == {1, 3}
    assert served.metrics().used_blocks == 0
    assert record.names.count("a decode step") > 0
    assert served._runner.captured > 0.7 * served._runner.launched  # type: ignore[attr-defined]


def test_a_bias_and_logprobs_change_nothing_for_others() -> None:
    samplings = [MIXED[0], PENALIZED[0], Sampling()]
    plain = {str(i): alone(i, sampling) for i, sampling in enumerate(samplings)}
    items = requests(samplings)
    items[2] = Generate(id="2", prompt=items[2].prompt, max_new_tokens=COUNT, logprobs=3, logit_bias={5: 100.0})
    served = engine()
    pace(served).fix(3)
    steps = planned(served)
    got = run(served, items)
    assert set(steps) == {1}, "what the host tells of a token it must see"
    assert [got[str(i)].tokens for i in range(2)] == [plain["0"], plain["1"]]
    assert got["2"].tokens == [5] * COUNT
    told = [item for answer in got["2"].answers for item in answer.logprobs or []]
    assert len(told) == COUNT
    held = session()
    logits = held.prefill([items[2].prompt])
    for item in told:
        expected = torch.log_softmax(torch.from_numpy(logits[0]), 0)
        top = expected.topk(3)
        assert [token for token, _ in item.top] == top.indices.tolist()
        np.testing.assert_allclose([value for _, value in item.top], top.values.numpy(), atol=1e-5)
        np.testing.assert_allclose(item.chosen, expected[5].item(), atol=1e-5)
        logits = held.decode([5])


def test_one_that_gave_way_draws_the_same() -> None:
    """A pool for one and a half of them."""
    plan = MemoryPlan(weights=0, working=0, pool=0, num_blocks=3, prompt_tokens=256)
    served = PagedEngine(
        CudaSession(compiled(), plan).model, EngineOptions(max_running=4, token_budget=64), DeviceRunner
    )
    pace(served).fix(4)
    steps = planned(served)
    prompts = sequences(50, 55)
    samplings = [MIXED[0], PENALIZED[0]]
    items = [
        Generate(id=str(i), prompt=prompt, max_new_tokens=30, sampling=sampling)
        for i, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True))
    ]
    got = run(served, items)
    assert served.metrics().preemptions == 1
    assert max(steps) == 4
    for i in range(2):
        expected = generate(session(), [prompts[i]], max_new_tokens=30, sampling=samplings[i]).tokens[0]
        assert got[str(i)].tokens == expected


def test_rows_move_down_when_few_are_left() -> None:
    """Of eight requests the last one runs longer; its steps are those of one row then. Draws and tables move along."""
    record = Recordings()
    plan = MemoryPlan(weights=0, working=0, pool=0, num_blocks=32, prompt_tokens=256)
    model = CudaSession(compiled(), plan, record=record).model
    for steps, sampling, batches in ((1, PENALIZED[0], {8, 4, 2, 1}), (2, MIXED[0], {8, 4, 1})):
        served = PagedEngine(model, EngineOptions(max_running=8, token_budget=128), DeviceRunner)
        pace(served).fix(steps)
        prompts = sequences(7, 7, 7, 7, 7, 7, 7, 70)
        items = [
            Generate(id=str(i), prompt=prompt, max_new_tokens=40 if i == 7 else 3 + i, sampling=sampling)
            for i, prompt in enumerate(prompts)
        ]
        got = run(served, items)
        expected = generate(session(), [prompts[7]], max_new_tokens=40, sampling=sampling).tokens[0]
        assert got["7"].tokens == expected
        assert {batch for batch, _, _ in served._runner._steps} == batches  # type: ignore[attr-defined]
        assert not served.scheduler.places.late


def test_a_warm_up_records_what_comes_first() -> None:
    """Steps of all batches over narrow tables, and calls whose tokens are powers of two; the rest when it comes."""
    record = Recordings()
    served = engine(record, warm_up=True)
    names = list(record.names)
    assert names.count("a decode step") == 3
    assert {name for name in names if name.startswith("a prompt")} == {
        f"a prompt of {tokens} tokens" for tokens in (16, 32, 64)
    }
    got = run(served, requests([Sampling()] * 3))
    assert [got[str(i)].tokens for i in range(3)] == [alone(i, Sampling()) for i in range(3)]
    assert record.names == names, "none is new: the prompts take 21 + 9, 62 and then 30 tokens"


def test_steps_of_short_requests_read_narrow_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here up to one block of 64 tokens; longer ones read the whole table, with the same answers."""
    monkeypatch.setattr(device_runner, "_NARROW", 64)
    served = engine(Recordings(), warm_up=True)
    steps = served._runner._steps  # type: ignore[attr-defined]
    assert {width for _, width, _ in steps} == {1}
    got = run(served, requests([Sampling()] * 3))
    assert [got[str(i)].tokens for i in range(3)] == [alone(i, Sampling()) for i in range(3)]
    assert {width for _, width, _ in steps} == {1, 4}
