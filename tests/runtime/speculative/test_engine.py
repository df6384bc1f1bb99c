"""Engines that speculate give what they give without it, whatever is drafted."""

from __future__ import annotations

import dataclasses
import functools

import pytest
from context_model import VOCAB, context_model, continuation
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import Got, run, take
from speculation import Guesser, speculating, teller
from stages import apply, sequences, tiny_decoder

from optc.compiler.diagnostics import TargetError
from optc.passes.kv_cache.paged import PageKVCache
from optc.passes.kv_cache.static import StaticKVCache
from optc.runtime.sampling import Sampling
from optc.runtime.serving.engine import engine_for
from optc.runtime.serving.engine_options import EngineOptions
from optc.runtime.serving.model_runner import HostRunner
from optc.runtime.serving.paged_engine import PagedEngine
from optc.runtime.serving.request import Generate
from optc.runtime.sessions.paged import PagedModel, PagedSession
from optc.runtime.sessions.program import open_program
from optc.runtime.speculative.settings import Speculation


def guesser(wrong: float) -> Guesser:
    return Guesser(continuation, wrong, VOCAB)


@functools.cache
def tiny(select_logits: bool = False, num_blocks: int = 64) -> PagedModel:
    program = apply(PageKVCache(block_size=4, select_logits=select_logits), tiny_decoder()).program
    session = open_program(program, num_blocks=num_blocks)
    assert isinstance(session, PagedSession)
    return session.model


def requests(*samplings: Sampling, count: int = 20) -> list[Generate]:
    prompts = sequences(5, 1, 14, 9)
    kinds = [samplings[place % len(samplings)] for place in range(len(prompts))]
    return [
        Generate(id=str(place), prompt=prompt, max_new_tokens=count, sampling=sampling)
        for place, (prompt, sampling) in enumerate(zip(prompts, kinds, strict=True))
    ]


@pytest.mark.parametrize("wrong", [0.0, 0.4, 1.0])
def test_fewer_steps_and_the_same_tokens(wrong: float) -> None:
    drafter = guesser(wrong)
    engine = speculating(context_model(64), drafter, max_running=2, token_budget=16)
    wanted = [Generate(id=str(place), prompt=[place, 3, 1], max_new_tokens=21) for place in range(4)]
    got = run(engine, wanted)
    for item in wanted:
        assert (got[item.id].tokens, got[item.id].finish) == (continuation(item.prompt, 21), "length")
    figures = engine.metrics().speculation
    assert figures is not None
    assert figures.acceptance_length is not None
    if wrong == 0:  # each pair of requests: a step for prompts, then five tokens a step
        assert engine.metrics().steps == 2 * (1 + 4)
        assert figures.acceptance_length == 5
        assert figures.acceptance_by_position == [1.0] * 4
    if wrong == 1:
        assert figures.acceptance_length == 1
    assert engine.metrics().generated_tokens == 4 * 21
    assert sorted(drafter.forgotten) == ["0", "1", "2", "3"]
    engine.close()
    assert drafter.forgotten[-1] == ""


def test_a_drafter_learns_what_the_model_said() -> None:
    drafter = guesser(0.5)
    engine = speculating(context_model(64), drafter)
    run(engine, [Generate(id="a", prompt=[4, 4], max_new_tokens=30)])
    text = [4, 4, *continuation([4, 4], 30)]
    assert {item.accepted for item in drafter.seen} >= {0, 1, 2}
    for place, item in enumerate(drafter.seen):
        right = continuation(text[: 3 + sum(1 + before.accepted for before in drafter.seen[:place])], 5)
        kept = item.drafted[: item.accepted].tolist()
        assert kept == right[: item.accepted]
        assert len(item.decided) == len(item.drafted) + 1


@pytest.mark.parametrize("select_logits", [False, True])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(repetition_penalty=1.3, frequency_penalty=0.2),
        Sampling(temperature=0.9, seed=5),
        Sampling(temperature=0.5, top_k=12, top_p=0.9, min_p=0.01, presence_penalty=0.5, seed=9),
    ],
)
def test_seeds_give_the_tokens_that_they_give_without_drafts(select_logits: bool, sampling: Sampling) -> None:
    """Greedy requests beside them, in blocks of 4."""
    model = tiny(select_logits)
    wanted = requests(sampling, Sampling())
    plain = run(PagedEngine(model, EngineOptions(), HostRunner), wanted)
    engine = speculating(model, teller(wanted, plain, 128))
    assert _tokens(run(engine, wanted)) == _tokens(plain)
    figures = engine.metrics().speculation
    assert figures is not None
    assert figures.acceptance_length is not None
    assert 2 < figures.acceptance_length < 5


def _tokens(got: dict[str, Got]) -> dict[str, tuple[list[int], str | None]]:
    return {name: (item.tokens, item.finish) for name, item in got.items()}


def test_a_full_pool_in_the_middle_of_drafts() -> None:
    model = tiny()
    small = dataclasses.replace(model, num_blocks=11, pools=[pool[:11] for pool in model.pools])
    wanted = requests(Sampling(), Sampling(temperature=0.8, seed=3))
    plain = run(PagedEngine(model, EngineOptions(), HostRunner), wanted)
    engine = speculating(small, teller(wanted, plain, 128), max_running=4, token_budget=12)
    assert _tokens(run(engine, wanted)) == _tokens(plain)
    assert engine.metrics().preemptions > 0
    assert engine.metrics().used_blocks == 0


def test_logprobs_and_biases_are_those_without_drafts() -> None:
    model = tiny()
    plain_requests = requests(Sampling(), Sampling(temperature=0.7))
    wanted = [
        Generate(
            id=item.id,
            prompt=item.prompt,
            max_new_tokens=16,
            sampling=item.sampling,
            logprobs=2 if item.id in "12" else None,
            logit_bias={7: 1.5, 9: -100.0} if item.id in "13" else {},
        )
        for item in plain_requests
    ]
    plain = run(PagedEngine(model, EngineOptions(), HostRunner), wanted)
    found = run(speculating(model, teller(wanted, plain, 128)), wanted)
    assert _tokens(found) == _tokens(plain)
    for name in "12":
        ours, theirs = (
            [told for answer in got[name].answers for told in answer.logprobs or []] for got in (found, plain)
        )
        assert [item.chosen for item in ours] == pytest.approx([item.chosen for item in theirs], abs=1e-5)
        assert [[token for token, _ in item.top] for item in ours] == [
            [token for token, _ in item.top] for item in theirs
        ]


def test_what_follows_a_stop_token_is_dropped() -> None:
    engine = speculating(context_model(64), guesser(0.0))
    text = continuation([6, 2], 30)
    stop = text[12]
    got = run(engine, [Generate(id="a", prompt=[6, 2], max_new_tokens=30, stop_ids=[stop, 0])])["a"]
    assert (got.tokens, got.finish) == (text[: text.index(stop) + 1], "stop")
    assert engine.scheduler.manager.free_blocks == 64


def test_blocks_with_rejected_tokens_are_not_found_by_others() -> None:
    """The first request is fed wrong tokens; a second one whose prompt has these very tokens computes them itself."""
    drafter = guesser(1.0)
    engine = speculating(context_model(64), drafter)
    run(engine, [Generate(id="a", prompt=[5] * 7, max_new_tokens=12)])
    fed = next(item for item in drafter.seen if len(item.drafted) == 4)
    prompt = [*fed.tokens.tolist()[: 7 + 1], *fed.drafted.tolist(), 1, 2]
    got = run(engine, [Generate(id="b", prompt=prompt, max_new_tokens=6)])["b"]
    assert got.tokens == continuation(prompt, 6)


def test_prompts_come_first_in_the_budget_and_others_in_blocks() -> None:
    """A long prompt takes what a draft would; no request gives way for one."""
    engine = speculating(context_model(12), guesser(0.0), max_running=2, token_budget=6)
    sizes: list[tuple[int, int]] = []
    launch = engine._runner.launch

    def noted(plan):  # type: ignore[no-untyped-def]
        sizes.append((int(plan.drafted.sum()), sum(piece.size for piece in plan.pieces)))
        assert plan.tokens <= 6
        launch(plan)

    engine._runner.launch = noted  # type: ignore[method-assign]
    engine.submit(Generate(id="a", prompt=[1], max_new_tokens=16))
    got: dict[str, Got] = {}
    take(got, engine.step())
    run(engine, [Generate(id="b", prompt=[2] * 24, max_new_tokens=3)], got=got)
    assert sizes[:6] == [(0, 1), (0, 5), (0, 5), (0, 5), (0, 5), (1, 4)]
    assert got["a"].tokens == continuation([1], 16)
    assert engine.metrics().preemptions == 0


def test_a_cache_that_is_not_paged_cannot_verify() -> None:
    session = open_program(apply(StaticKVCache(in_place=True), tiny_decoder()).program)
    with pytest.raises(TargetError, match="cannot verify drafts"):
        engine_for(session, EngineOptions(speculation=Speculation(method="ngram")))


@st.composite
def arrivals(draw: st.DrawFn) -> list[tuple[int, Generate, int | None]]:
    """Requests with the step in which they come, and the one in which they are cancelled."""
    found = []
    for index in range(draw(st.integers(1, 7))):
        item = Generate(
            id=str(index),
            prompt=draw(st.lists(st.integers(0, 1), min_size=1, max_size=22)),
            max_new_tokens=draw(st.integers(1, 16)),
            priority=draw(st.integers(-1, 2)),
            stop_ids=draw(st.sampled_from([[], [*range(0, VOCAB, 9)]])),
        )
        begin = draw(st.integers(0, 8))
        cancelled = begin + draw(st.integers(0, 8)) if draw(st.integers(0, 3)) == 0 else None
        found.append((begin, item, cancelled))
    return found


@settings(max_examples=150, deadline=None)
@given(
    coming=arrivals(),
    num_blocks=st.integers(6, 14),
    max_running=st.integers(1, 6),
    budget=st.integers(1, 12),
    draft_tokens=st.integers(1, 9),
    wrong=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_any_traffic(
    coming: list[tuple[int, Generate, int | None]],
    num_blocks: int,
    max_running: int,
    budget: int,
    draft_tokens: int,
    wrong: float,
) -> None:
    """Every answer is the one of the request alone; no block is left; no step is larger than its budget."""
    limit = max_running + budget
    engine = speculating(
        context_model(num_blocks),
        guesser(wrong),
        draft_tokens=draft_tokens,
        max_running=max_running,
        token_budget=limit,
    )
    sizes: list[int] = []
    launch = engine._runner.launch
    engine._runner.launch = lambda plan: (sizes.append(plan.tokens), launch(plan))[1]  # type: ignore[method-assign]
    got: dict[str, Got] = {}
    for step in range(600):
        for begin, item, cancelled in coming:
            if begin == step:
                engine.submit(item)
            if cancelled == step:
                engine.cancel(item.id)
        take(got, engine.step())
        if step > 20 and engine.idle:
            break
    assert engine.idle
    assert engine.scheduler.manager.free_blocks == num_blocks
    assert max(sizes, default=0) <= limit
    for _, item, cancelled in coming:
        room = num_blocks * 4 + 1 - len(item.prompt)
        expected = continuation(item.prompt, min(item.max_new_tokens, room), item.stop_ids)
        found = got[item.id]
        if found.finish == "cancelled":
            assert cancelled is not None
            assert found.tokens == expected[: len(found.tokens)]
        else:
            assert found.tokens == expected
