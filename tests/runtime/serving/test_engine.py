"""Engines against one request after another: every answer is what the request would have got alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import pytest
import torch
from serving import Got, run, take
from stages import apply, sequences, tiny_decoder

from optc.compiler.diagnostics import BusyError, InputError, UsageError
from optc.compiler.ir.program import Program
from optc.passes.kv_cache.paged import PageKVCache
from optc.passes.kv_cache.static import StaticKVCache
from optc.runtime.generation.generate import generate
from optc.runtime.serving.engine import engine_for
from optc.runtime.serving.engine_options import EngineOptions
from optc.runtime.serving.paged_engine import PagedEngine
from optc.runtime.serving.request import Generate
from optc.runtime.sessions.paged import PagedModel
from optc.runtime.sessions.program import open_program

BLOCK = 4


@functools.cache
def program(kind: str = "paged") -> Program:
    rewrite = {"paged": PageKVCache(block_size=BLOCK), "linear": StaticKVCache(in_place=True)}[kind]
    return apply(rewrite, tiny_decoder()).program


def paged(num_blocks: int = 64, **options: int) -> PagedEngine:
    found = engine_for(open_program(program(), num_blocks=num_blocks), EngineOptions(**options))
    assert isinstance(found, PagedEngine)
    return found


@functools.cache
def alone(prompt: tuple[int, ...], count: int) -> list[int]:
    """What a session of one row generates."""
    session = open_program(program(), num_blocks=64)
    return generate(session, [prompt], max_new_tokens=count).tokens[0]


def request(name: str, prompt: Sequence[int], count: int, **others: object) -> Generate:
    return Generate(id=name, prompt=list(prompt), max_new_tokens=count, **others)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["paged", "linear"])
def test_answers_are_those_of_each_request_alone(kind: str) -> None:
    engine = engine_for(open_program(program(kind)), EngineOptions(max_running=3, token_budget=8))
    prompts = sequences(5, 1, 23, 9, 2)
    got = run(engine, [request(str(i), prompt, 6 + i) for i, prompt in enumerate(prompts)])
    assert engine.info.serves == {"paged": "continuous", "linear": "one-at-a-time"}[kind]
    for i, prompt in enumerate(prompts):
        assert (got[str(i)].tokens, got[str(i)].finish) == (alone(tuple(prompt), 6 + i), "length")
    metrics = engine.metrics()
    assert (metrics.used_blocks, metrics.running, metrics.waiting) == (0, 0, 0)
    assert metrics.finished == {"length": 5}
    assert metrics.prompt_tokens == sum(map(len, prompts))
    assert metrics.generated_tokens == sum(range(6, 11))


def test_a_request_alone_runs_the_calls_of_a_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server runs what generation and evaluation run: one method of the model, with the same tensors."""
    calls: list[list[torch.Tensor]] = []
    through = PagedModel.call

    def call(self: PagedModel, inputs: Sequence[torch.Tensor], wanted: torch.Tensor, tree: None = None) -> object:
        calls.append([item.clone() for item in (*inputs, wanted)])
        return through(self, inputs, wanted, tree)

    monkeypatch.setattr(PagedModel, "call", call)
    (prompt,) = sequences(9)
    session = open_program(program(), num_blocks=64)
    expected = generate(session, [prompt], max_new_tokens=6).tokens[0]
    of_session, calls = calls, []
    got = run(paged(), [request("a", prompt, 6)])["a"]
    assert got.tokens == expected
    assert [len(call[0]) for call in calls] == [9, 1, 1, 1, 1, 1], "no token is fed by another way"
    for ours, theirs in zip(calls, of_session, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_requests_join_and_leave_at_every_step() -> None:
    """Those that come while others run take no longer than alone, but for waiting."""
    engine = paged(max_running=4, token_budget=16)
    prompts = sequences(6, 3, 11)
    got: dict[str, Got] = {}
    for i, prompt in enumerate(prompts):
        engine.submit(request(str(i), prompt, 8))
        take(got, engine.step())
    assert [len(got[name].tokens) for name in "012"] == [3, 2, 1]
    assert run(engine)["2"].tokens == alone(tuple(prompts[2]), 8)[1:]


def test_a_prompt_that_the_pool_holds_is_not_computed_again() -> None:
    engine = paged()
    (prompt,) = sequences(11)
    first = run(engine, [request("a", prompt, 5)])["a"]
    second = run(engine, [request("b", prompt, 5)])["b"]
    assert [first.answers[0].cached_tokens, second.answers[0].cached_tokens] == [0, 10], (
        "two blocks, a copy of the third"
    )
    again = run(engine, [request("c", [*prompt, *second.tokens, 7], 1)])["c"]
    assert again.answers[0].cached_tokens == 12  # of 15 in the pool: the last token was not fed
    assert first.tokens == second.tokens


def test_requests_with_one_beginning_compute_it_once() -> None:
    engine = paged(token_budget=65)
    (prompt,) = sequences(11)
    got = run(engine, [request(str(i), [*prompt, i], 3) for i in range(3)])
    assert [got[str(i)].answers[0].cached_tokens for i in range(3)] == [0, 11, 11], "the others go on in copies"
    assert [got[str(i)].tokens for i in range(3)] == [alone((*prompt, i), 3) for i in range(3)]


def test_a_full_pool_makes_the_last_wait_again() -> None:
    engine = paged(num_blocks=7, max_running=4, token_budget=16)
    prompts = sequences(4, 5, 6)
    got = run(engine, [request(str(i), prompt, 12) for i, prompt in enumerate(prompts)])
    assert [got[str(i)].tokens for i in range(3)] == [alone(tuple(prompt), 12) for prompt in prompts]
    metrics = engine.metrics()
    assert metrics.preemptions > 0
    assert metrics.used_blocks == 0
    assert metrics.generated_tokens == 36
    assert got["0"].answers[-1].finish == "length"


def test_stop_tokens_end_with_the_token() -> None:
    (prompt,) = sequences(9)
    expected = alone(tuple(prompt), 10)
    others = [token for token in range(128) if token not in expected][:7]
    got = run(paged(), [request("a", prompt, 10, stop_ids=[*others, expected[4]])])["a"]
    assert (got.tokens, got.finish) == (expected[: expected.index(expected[4]) + 1], "stop")


def test_a_full_context_ends() -> None:
    (prompt,) = sequences(60)
    got = run(paged(), [request("a", prompt, 100)])["a"]
    assert (len(got.tokens), got.finish) == (5, "context")
    small = run(paged(num_blocks=3), [request("a", prompt[:9], 100)])["a"]
    assert (small.tokens, small.finish) == (alone(tuple(prompt[:9]), 4), "context")


def test_cancelled_requests_leave_nothing() -> None:
    engine = paged(max_running=2, token_budget=8)
    prompts = sequences(5, 30, 7)
    for i, prompt in enumerate(prompts):
        engine.submit(request(str(i), prompt, 9))
    got: dict[str, Got] = {}
    take(got, engine.step())
    for name in ("0", "1", "2", "unknown", "0"):
        engine.cancel(name)
    take(got, engine.step())
    assert {name: item.finish for name, item in got.items()} == dict.fromkeys("012", "cancelled")
    assert got["0"].tokens == alone(tuple(prompts[0]), 9)[:1]
    assert engine.idle
    assert engine.metrics().used_blocks == 0


@pytest.mark.parametrize("kind", ["paged", "linear"])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": [128]}, "token id 128 is outside the vocabulary"),
        ({"prompt": [-1]}, "token id -1 is outside the vocabulary"),
        ({"stop_ids": [128]}, "token id 128 is outside the vocabulary"),
        ({"logit_bias": {200: 1.0}}, "token id 200 is outside the vocabulary"),
        ({"logit_bias": {3: float("nan")}}, "the bias of token 3 is not a finite number"),
        ({"prompt": [5] * 65}, "a prompt of 65 tokens does not fit the context of 64"),
        ({"id": "old"}, "a request of this name has not ended"),
    ],
)
def test_requests_that_are_refused(kind: str, wrong: dict[str, object], message: str) -> None:
    engine = engine_for(open_program(program(kind)), EngineOptions())
    engine.submit(request("old", [1], 1))
    with pytest.raises(InputError) as caught:
        engine.submit(Generate(**{"id": "new", "prompt": [1], "max_new_tokens": 1, **wrong}))  # type: ignore[arg-type]
    assert caught.value.what == message
    assert engine.metrics().waiting == 1


@pytest.mark.parametrize("kind", ["paged", "linear"])
def test_too_many_waiting_are_refused(kind: str) -> None:
    engine = engine_for(open_program(program(kind)), EngineOptions(max_waiting=2))
    for name in "ab":
        engine.submit(request(name, [1], 1))
    with pytest.raises(BusyError, match="too many requests wait"):
        engine.submit(request("c", [1], 1))
    assert sorted(run(engine)) == ["a", "b"]


def test_a_budget_without_room_for_prompts_is_refused() -> None:
    with pytest.raises(UsageError, match="a budget of 64 tokens leaves no room for prompts"):
        paged(max_running=64, token_budget=64)


class _Poisoned:
    """A program whose logits are not finite where a token is fed."""

    def __init__(self, run: Callable[..., torch.Tensor], token: int) -> None:
        self._run, self._token = run, token

    def __call__(self, ids: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        logits = self._run(ids, *rest)
        logits = logits[0] if isinstance(logits, tuple | list) else logits
        return torch.where((ids == self._token)[:, None], float("nan"), logits)


def test_logits_that_are_not_finite_end_their_request_only() -> None:
    session = open_program(program(), num_blocks=64)
    session._graph = _Poisoned(session._graph, 78)  # type: ignore[attr-defined]
    engine = engine_for(session, EngineOptions())
    prompts = [[5, 9, 2, 8, 78], [6, 9, 2, 8]]
    got = run(engine, [request(str(i), prompt, 6) for i, prompt in enumerate(prompts)])
    assert (got["0"].tokens, got["0"].finish) == ([], "error")
    assert "not finite" in got["0"].answers[-1].error
    assert (got["1"].tokens, got["1"].finish) == (alone((6, 9, 2, 8), 6), "length")
    assert engine.metrics().used_blocks == 0
    again = run(engine, [request("again", [5, 9, 2, 8, 6], 1)])["again"]
    assert again.answers[0].cached_tokens == 0  # nothing is taken over from the request that failed
