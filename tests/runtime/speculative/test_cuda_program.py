"""Drafts over the program of the CUDA target, on the CPU: with recordings in place of graphs, against plain decoding."""

from __future__ import annotations

import pytest
from cuda_sessions import LENGTHS, MIXED, compiled
from recorded_calls import Recordings
from serving import Got, run, take
from speculation import speculating, teller
from stages import VOCAB, sequences

from optc.runtime.sampling import Sampling
from optc.runtime.serving.device_runner import DeviceRunner
from optc.runtime.serving.engine import engine_for
from optc.runtime.serving.engine_options import EngineOptions
from optc.runtime.serving.paged_engine import PagedEngine
from optc.runtime.serving.request import Generate
from optc.runtime.sessions.cuda import CudaSession
from optc.runtime.sessions.cuda_memory import MemoryPlan
from optc.runtime.speculative.settings import Speculation

COUNT = 24


def session(record: Recordings | None = None, num_blocks: int = 16) -> CudaSession:
    plan = MemoryPlan(weights=0, working=0, pool=0, num_blocks=num_blocks, prompt_tokens=256)
    return CudaSession(compiled(), plan, record=record)


def requests(samplings: list[Sampling], **others: object) -> list[Generate]:
    return [
        Generate(id=str(place), prompt=prompt, max_new_tokens=COUNT, sampling=sampling, **others)  # type: ignore[arg-type]
        for place, (prompt, sampling) in enumerate(zip(sequences(*LENGTHS), samplings, strict=True))
    ]


def plainly(wanted: list[Generate]) -> dict[str, Got]:
    return run(engine_for(session(), EngineOptions(max_running=4, token_budget=64)), wanted)


def tokens(got: dict[str, Got]) -> dict[str, list[int]]:
    return {name: item.tokens for name, item in got.items()}


GREEDY_PENALTIES = [Sampling(), Sampling(repetition_penalty=1.8), Sampling(presence_penalty=0.5, frequency_penalty=0.7)]


@pytest.mark.parametrize("samplings", [[Sampling()] * 3, MIXED, GREEDY_PENALTIES])
@pytest.mark.parametrize("wrong", [0.0, 0.4])
def test_tokens_are_those_of_plain_decoding(samplings: list[Sampling], wrong: float) -> None:
    """Drawn ones too, by their seeds. Requests join in the middle, and meet calls that were recorded without them."""
    wanted = requests(samplings)
    plain = plainly(wanted)
    record = Recordings()
    drafter = teller(wanted, plain, VOCAB, wrong)
    engine = speculating(session(record).model, drafter, max_running=4, token_budget=64)
    for _ in range(2):
        got: dict[str, Got] = {}
        for item in wanted:
            engine.submit(item)
            for _ in range(2):
                take(got, engine.step())
        run(engine, got=got)
        assert tokens(got) == tokens(plain)
    figures = engine.metrics().speculation
    assert figures is not None
    assert figures.accepted_tokens > (60 if wrong else 90)
    assert engine.metrics().used_blocks == 0
    assert record.replays


def test_steps_with_drafts_and_without_follow_each_other() -> None:
    """A drafter that now and then knows nothing; penalties look at tokens that a step with drafts gave."""
    wanted = requests(GREEDY_PENALTIES)
    plain = plainly(wanted)
    drafter = teller(wanted, plain, VOCAB, 0.2)
    propose, turn = drafter.propose, iter(range(10**6))
    drafter.propose = lambda asks: propose(asks) if next(turn) % 3 == 0 else [[] for _ in asks]  # type: ignore[method-assign]
    engine = speculating(session(Recordings()).model, drafter, max_running=4, token_budget=64)
    assert tokens(run(engine, wanted)) == tokens(plain)


def test_a_pool_too_small_for_all() -> None:
    """Requests give way in the middle, and are computed again."""
    wanted = [
        Generate(id=str(i), prompt=prompt, max_new_tokens=COUNT) for i, prompt in enumerate(sequences(60, 61, 62))
    ]
    plain = plainly(wanted)
    small = session(Recordings(), num_blocks=4).model
    engine = speculating(small, teller(wanted, plain, VOCAB), max_running=4, token_budget=64)
    assert tokens(run(engine, wanted)) == tokens(plain)
    assert engine.metrics().preemptions > 0


def test_logprobs_and_biases() -> None:
    wanted = requests([Sampling()] * 3, logprobs=2, logit_bias={7: 3.0})
    plain = plainly(wanted)
    engine = speculating(session().model, teller(wanted, plain, VOCAB), max_running=4, token_budget=64)
    got = run(engine, wanted)
    assert tokens(got) == tokens(plain)
    for name, item in got.items():
        told = [entry for answer in item.answers for entry in answer.logprobs or []]
        expected = [entry for answer in plain[name].answers for entry in answer.logprobs or []]
        assert [entry.chosen for entry in told] == pytest.approx([entry.chosen for entry in expected], abs=1e-4)


def test_the_engine_of_an_artifact_runs_drafts_on_the_device() -> None:
    options = EngineOptions(max_running=4, token_budget=64, speculation=Speculation(method="suffix"))
    engine = engine_for(session(), options)
    assert isinstance(engine, PagedEngine)
    assert isinstance(engine._runner, DeviceRunner)
    assert engine._runner.ahead == 0
    (prompt,) = sequences(9)
    item = Generate(id="a", prompt=prompt, max_new_tokens=12, sampling=Sampling(temperature=1.0, seed=3))
    assert tokens(run(engine, [item])) == tokens(plainly([item]))
