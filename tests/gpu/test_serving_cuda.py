"""The engine with captured steps on a GPU, against sessions of one row."""

from __future__ import annotations

import pytest
import torch
from cuda_sessions import LENGTHS, MIXED, PENALIZED, compiled
from serving import run
from stages import sequences

from optc.compiler.ir.devices import to_device
from optc.runtime.generation.generate import generate
from optc.runtime.sampling import Sampling
from optc.runtime.serving.device_runner import DeviceRunner
from optc.runtime.serving.engine_options import EngineOptions
from optc.runtime.serving.paged_engine import PagedEngine
from optc.runtime.serving.request import Generate
from optc.runtime.sessions.cuda import CudaSession
from optc.runtime.sessions.cuda_memory import plan_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
COUNT = 40


def session() -> CudaSession:
    device = torch.device("cuda", 0)
    program = to_device(compiled().clone(), device)
    return CudaSession(program, plan_for(program, device, num_blocks=64, loaded=True))


@pytest.mark.parametrize("samplings", [[Sampling()] * 3, MIXED, PENALIZED])
def test_each_request_gets_what_it_gets_alone(samplings: list[Sampling]) -> None:
    """float32, twice: the second time steps and calls of every size are replayed, and five steps are launched at a time."""
    prompts = sequences(*LENGTHS)
    alone = session()
    expected = [
        generate(alone, [prompt], max_new_tokens=COUNT, sampling=sampling).tokens[0]
        for prompt, sampling in zip(prompts, samplings, strict=True)
    ]
    engine = PagedEngine(session().model, EngineOptions(max_running=8, token_budget=64), DeviceRunner)
    runner = engine._runner
    assert isinstance(runner, DeviceRunner)
    for steps in (1, 5):
        runner.pace.fix(steps)
        items = [
            Generate(id=str(i), prompt=prompt, max_new_tokens=COUNT, sampling=sampling)
            for i, (prompt, sampling) in enumerate(zip(prompts, samplings, strict=True))
        ]
        got = run(engine, items)
        assert [got[str(i)].tokens for i in range(3)] == expected
    assert engine.metrics().used_blocks == 0
    assert runner.captured > 0.8 * runner.launched


def test_a_bias_and_logprobs() -> None:
    engine = PagedEngine(session().model, EngineOptions(max_running=8, token_budget=64), DeviceRunner)
    (prompt,) = sequences(21)
    items = [
        Generate(id="a", prompt=prompt, max_new_tokens=5, logprobs=2, logit_bias={7: 100.0}),
        Generate(id="b", prompt=prompt, max_new_tokens=5),
    ]
    got = run(engine, items)
    assert got["a"].tokens == [7] * 5
    assert got["b"].tokens == generate(session(), [prompt], max_new_tokens=5).tokens[0]
    told = [item for answer in got["a"].answers for item in answer.logprobs or []]
    assert [len(item.top) for item in told] == [2] * 5
    assert all(item.chosen <= item.top[0][1] <= 0 for item in told)  # the model's own, without the bias
    assert min(item.chosen for item in told) < -0.1
