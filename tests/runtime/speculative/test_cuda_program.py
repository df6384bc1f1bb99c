"""Drafts over the program of the CUDA target, on the CPU: its ops and its greedy choice, without recorded steps."""

from __future__ import annotations

from cuda_sessions import LENGTHS, compiled
from serving import run
from speculation import speculating, teller
from stages import VOCAB, sequences

from optc.runtime.sampling import Sampling
from optc.runtime.serving.engine import engine_for
from optc.runtime.serving.engine_options import EngineOptions
from optc.runtime.serving.model_runner import HostRunner
from optc.runtime.serving.paged_engine import PagedEngine
from optc.runtime.serving.request import Generate
from optc.runtime.sessions.cuda import CudaSession
from optc.runtime.sessions.cuda_memory import MemoryPlan
from optc.runtime.speculative.settings import Speculation


def session() -> CudaSession:
    return CudaSession(compiled(), MemoryPlan(weights=0, working=0, pool=0, num_blocks=16, prompt_tokens=256))


def test_greedy_tokens_are_those_of_the_device_runner() -> None:
    wanted = [
        Generate(id=str(place), prompt=prompt, max_new_tokens=12) for place, prompt in enumerate(sequences(*LENGTHS))
    ]
    plain = run(engine_for(session(), EngineOptions(max_running=4, token_budget=64)), wanted)
    engine = speculating(session().model, teller(wanted, plain, VOCAB), max_running=4, token_budget=64)
    found = run(engine, wanted)
    assert {name: item.tokens for name, item in found.items()} == {name: item.tokens for name, item in plain.items()}
    figures = engine.metrics().speculation
    assert figures is not None
    assert figures.accepted_tokens > 10


def test_drafts_are_made_on_the_runner_that_waits_for_the_host() -> None:
    """Drawn tokens, whose distribution alone is held to: a seed gives others than on the device."""
    options = EngineOptions(max_running=4, token_budget=64, speculation=Speculation(method="suffix"))
    engine = engine_for(session(), options)
    assert isinstance(engine, PagedEngine)
    assert isinstance(engine._runner, HostRunner)
    (prompt,) = sequences(9)
    item = Generate(id="a", prompt=prompt, max_new_tokens=12, sampling=Sampling(temperature=1.0, seed=3))
    first, second = (run(engine, [item])["a"].tokens for _ in range(2))
    assert first == second
