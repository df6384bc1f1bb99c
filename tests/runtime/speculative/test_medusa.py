"""Medusa through the engine: guesses stand behind the token that was decided; answers are those of plain decoding."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from context_model import VOCAB, context_model, continuation
from cuda_sessions import LENGTHS, compiled
from medusa_heads import write_heads
from serving import Got, run
from speculation import continued_in_a_small_pool, speculating
from stages import apply, sequences, tiny_decoder
from torch import Tensor

from optc.compiler.diagnostics import TargetError, UsageError
from optc.passes.drafting.medusa_heads import AddMedusaHeads
from optc.passes.kv_cache.paged import PageKVCache
from optc.runtime.sampling import Sampling
from optc.runtime.serving.engine import engine_for
from optc.runtime.serving.engine_options import EngineOptions
from optc.runtime.serving.model_runner import HostRunner
from optc.runtime.serving.paged_engine import PagedEngine
from optc.runtime.serving.request import Generate
from optc.runtime.sessions.cuda import CudaSession
from optc.runtime.sessions.cuda_memory import MemoryPlan
from optc.runtime.sessions.paged import PagedModel, PagedSession
from optc.runtime.sessions.program import open_program
from optc.runtime.speculative.medusa import MedusaDrafter
from optc.runtime.speculative.opening import Verifying, open_drafter
from optc.runtime.speculative.settings import Speculation, speculation_of

HEADS = 3


def knowing(wrong: int, num_blocks: int = 64) -> PagedModel:
    """A model whose heads know what comes, but that each guess of a token that `wrong` divides is another one."""

    def forward(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        logits = plain.run(*inputs)
        ids, _, _, tables, lengths, starts, pool = inputs
        drafted = torch.zeros((len(ids), HEADS), dtype=torch.int64)
        flat, size = pool.view(-1), pool.shape[1]
        for row, (begin, end) in enumerate(itertools.pairwise(starts.tolist())):
            at = torch.arange(int(lengths[row]))
            held = flat[tables[row].long()[at // size] * size + at % size].tolist()
            for token in range(begin, end):
                coming = continuation(held[: len(held) - (end - 1 - token)], HEADS + 1)[1:]
                drafted[token] = torch.tensor([(item + (item % wrong == 0)) % VOCAB for item in coming])
        return logits, drafted

    plain = context_model(num_blocks)
    return dataclasses.replace(plain, run=forward, gives=("drafted",), heads=HEADS)


@pytest.mark.parametrize("wrong", [VOCAB + 1, 3])
def test_guesses_stand_where_they_belong(wrong: int) -> None:
    """Ragged prompts in pieces, in a pool in which requests give way; where heads are right, all is accepted."""
    engine = speculating(knowing(wrong, 13), MedusaDrafter(), draft_tokens=0, max_running=3, token_budget=14)
    figures = continued_in_a_small_pool(engine)
    assert len(figures.drafted_at) == HEADS
    if wrong > VOCAB:  # a draft whose head guessed token 0 alone is wrong
        assert figures.acceptance_length > HEADS
    else:
        assert 1.5 < figures.acceptance_length < HEADS


def test_a_request_alone_takes_as_few_steps_as_heads_allow() -> None:
    engine = speculating(knowing(VOCAB + 1), MedusaDrafter(), draft_tokens=2)
    run(engine, [Generate(id="a", prompt=[5, 9], max_new_tokens=13)])
    figures = engine.metrics().speculation
    assert figures is not None
    assert (engine.metrics().steps, figures.acceptance_length) == (1 + 4, 3)  # the prompt's token, then three a step


@pytest.mark.parametrize("select_logits", [False, True])
def test_heads_of_a_program(select_logits: bool, tmp_path: Path) -> None:
    """Greedy and drawn requests side by side, in blocks of 4; the guesses of random heads are seldom right."""
    write_heads(tmp_path, 16, heads=4)
    program = apply(PageKVCache(block_size=4, select_logits=select_logits), tiny_decoder()).program
    session = open_program(apply(AddMedusaHeads(folder=str(tmp_path)), program).program, num_blocks=64)
    assert isinstance(session, PagedSession)
    kinds = (Sampling(), Sampling(temperature=0.5, top_p=0.9, repetition_penalty=1.2, seed=5))
    wanted = [
        Generate(id=str(place), prompt=prompt, max_new_tokens=24, sampling=kinds[place % 2])
        for place, prompt in enumerate(sequences(5, 1, 14, 9))
    ]
    plain = run(PagedEngine(session.model, EngineOptions(), HostRunner), wanted)
    engine = engine_for(
        session, EngineOptions(speculation=Speculation(method="medusa", draft_tokens=0, adaptive=False))
    )
    assert _tokens(run(engine, wanted)) == _tokens(plain)
    figures = engine.metrics().speculation
    assert figures is not None
    assert figures.verified > 60
    assert len(figures.drafted_at) == 4


def _tokens(got: dict[str, Got]) -> dict[str, list[int]]:
    return {name: item.tokens for name, item in got.items()}


def test_the_program_of_the_cuda_target(tmp_path: Path) -> None:
    """Through its whole recipe, on the CPU."""
    write_heads(tmp_path, 64)
    wanted = [
        Generate(id=str(place), prompt=prompt, max_new_tokens=12) for place, prompt in enumerate(sequences(*LENGTHS))
    ]
    plan = MemoryPlan(weights=0, working=0, pool=0, num_blocks=16, prompt_tokens=256)
    plain = run(engine_for(CudaSession(compiled(), plan), EngineOptions(max_running=4, token_budget=64)), wanted)
    session = CudaSession(compiled(heads=str(tmp_path)), plan)
    assert (session.model.gives, session.model.heads) == (("drafted",), 2)
    speculation = Speculation(method="medusa", draft_tokens=0, adaptive=False)
    engine = engine_for(session, EngineOptions(max_running=4, token_budget=64, speculation=speculation))
    assert _tokens(run(engine, wanted)) == _tokens(plain)
    figures = engine.metrics().speculation
    assert figures is not None
    assert figures.verified > 20


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(TargetError, match="the artifact has no Medusa heads"):
        open_drafter(
            Speculation(method="medusa", draft_tokens=0), Verifying(model=context_model(4), folder=None, running=1)
        )
    with pytest.raises(UsageError, match="--draft-tokens 4 is more than the 3 Medusa heads"):
        open_drafter(Speculation(method="medusa", draft_tokens=4), Verifying(model=knowing(3), folder=None, running=1))
    assert isinstance(
        open_drafter(Speculation(method="medusa", draft_tokens=3), Verifying(model=knowing(3), folder=None, running=1)),
        MedusaDrafter,
    )
    assert speculation_of("medusa", None, None) == Speculation(method="medusa", draft_tokens=0)
