"""Drafts and their verification on a GPU, against the captured steps of plain decoding."""

from __future__ import annotations

import pytest
import torch
from cuda_sessions import LENGTHS, MIXED, compiled
from serving import run
from speculation import speculating, teller
from stages import VOCAB, sequences

from optc.compiler.ir.devices import to_device
from optc.runtime.sampling import Sampling
from optc.runtime.serving.engine import engine_for
from optc.runtime.serving.engine_options import EngineOptions
from optc.runtime.serving.request import Generate
from optc.runtime.sessions.cuda import CudaSession
from optc.runtime.sessions.cuda_memory import plan_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def session() -> CudaSession:
    device = torch.device("cuda", 0)
    program = to_device(compiled().clone(), device)
    return CudaSession(program, plan_for(program, device, num_blocks=64, loaded=True))


@pytest.mark.parametrize(
    "samplings", [[Sampling()] * 3, [Sampling(repetition_penalty=1.3)] * 3, MIXED], ids=["greedy", "penalized", "drawn"]
)
def test_tokens_are_those_of_plain_decoding(samplings: list[Sampling]) -> None:
    """float32, ragged, across blocks; twice: the second time calls are replayed."""
    wanted = [
        Generate(id=str(place), prompt=prompt, max_new_tokens=40, sampling=sampling)
        for place, (prompt, sampling) in enumerate(zip(sequences(*LENGTHS), samplings, strict=True))
    ]
    plain = run(engine_for(session(), EngineOptions(max_running=8, token_budget=64)), wanted)
    engine = speculating(session().model, teller(wanted, plain, VOCAB), max_running=8, token_budget=64)
    for _ in range(2):
        found = run(engine, wanted)
        assert {name: item.tokens for name, item in found.items()} == {
            name: item.tokens for name, item in plain.items()
        }
    figures = engine.metrics().speculation
    assert figures is not None
    assert figures.accepted_tokens > 80


def test_a_session_may_be_closed_twice() -> None:
    closed = session()
    closed.close()
    closed.close()
