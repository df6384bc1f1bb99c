"""Choices of the engine on the host: frequencies against transformers' distributions, seeds, biases, log-probabilities."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from serving import Got, run, take
from stages import apply, sequences, tiny_decoder
from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from optc.compiler.ops.dialect.sampling import NO_TOKEN
from optc.passes.kv_cache.paged import PageKVCache
from optc.runtime.generation.generate import generate
from optc.runtime.sampling import Sampling
from optc.runtime.serving.engine import engine_for
from optc.runtime.serving.engine_options import EngineOptions
from optc.runtime.serving.interface import Engine
from optc.runtime.serving.request import Generate
from optc.runtime.serving.sampler import RequestSampler, choose, logprobs_of
from optc.runtime.sessions.paged import PagedSession
from optc.runtime.sessions.program import open_program

DRAWS = 4000
SAMPLINGS = [
    Sampling(temperature=1.3, seed=5),
    Sampling(temperature=0.7, top_k=5, seed=5),
    Sampling(temperature=0.9, top_p=0.8, min_p=0.05, repetition_penalty=1.2, frequency_penalty=0.3, seed=6),
    Sampling(repetition_penalty=1.5),
]


@pytest.mark.parametrize(
    ("sampling", "warpers"),
    [
        (Sampling(temperature=0.7), [TemperatureLogitsWarper(0.7)]),
        (Sampling(temperature=1.0, top_k=6), [TopKLogitsWarper(6)]),
        (Sampling(temperature=1.0, top_p=0.8), [TopPLogitsWarper(0.8)]),
        (Sampling(temperature=1.0, min_p=0.1), [MinPLogitsWarper(0.1)]),
        (
            Sampling(temperature=1.4, top_k=12, top_p=0.9, min_p=0.05),
            [TemperatureLogitsWarper(1.4), TopKLogitsWarper(12), TopPLogitsWarper(0.9), MinPLogitsWarper(0.05)],
        ),
    ],
)
def test_frequencies_are_those_of_the_distribution(sampling: Sampling, warpers: list[object]) -> None:
    """Chi-squared, at the 0.1 % point; with this seed it either holds always or never."""
    logits = torch.randn(1, 24, generator=torch.Generator().manual_seed(2)) * 1.5
    expected = functools.reduce(lambda scores, warper: warper(None, scores), warpers, logits)  # type: ignore[operator]
    shares = expected.softmax(-1)[0].double().numpy()
    sampler = RequestSampler(Generate(id="a", prompt=[1], max_new_tokens=1, sampling=sampling))
    found = np.bincount([sampler.choose(logits[0].numpy()) for _ in range(DRAWS)], minlength=24)
    kept = shares > 0
    assert not found[~kept].any()
    assert kept.sum() > 2
    wanted = DRAWS * shares[kept] / shares.sum()
    squares = torch.tensor(((found[kept] - wanted) ** 2 / wanted).sum())
    assert torch.special.gammaincc(torch.tensor((kept.sum() - 1) / 2), squares / 2) > 1e-3


@functools.cache
def _session() -> PagedSession:
    found = open_program(apply(PageKVCache(block_size=4), tiny_decoder()).program, num_blocks=40)
    assert isinstance(found, PagedSession)
    return found


def _engine() -> Engine:
    return engine_for(_session(), EngineOptions(max_running=4, token_budget=32))


def test_equal_seeds_give_equal_tokens_in_any_company() -> None:
    """Those of a session of one row; others that run along, come and go change nothing."""
    prompts = sequences(5, 9, 3, 12)
    alone = [
        generate(_session(), [prompt], max_new_tokens=12, sampling=sampling).tokens[0]
        for prompt, sampling in zip(prompts, SAMPLINGS, strict=True)
    ]
    items = [
        Generate(id=str(i), prompt=prompt, max_new_tokens=12, sampling=sampling)
        for i, (prompt, sampling) in enumerate(zip(prompts, SAMPLINGS, strict=True))
    ]
    for order in (items, items[::-1]):
        engine, got = _engine(), dict[str, Got]()
        for item in order:
            engine.submit(item)
            take(got, engine.step())
        run(engine, got=got)
        assert [got[str(i)].tokens for i in range(4)] == alone


def test_a_bias_and_logprobs() -> None:
    (prompt,) = sequences(6)
    free = Generate(id="free", prompt=prompt, max_new_tokens=4)
    ask = Generate(id="ask", prompt=prompt, max_new_tokens=3, logprobs=2, logit_bias={9: 1000.0})
    got = run(_engine(), [free, ask])
    assert got["ask"].tokens == [9, 9, 9]
    assert got["free"].tokens == generate(_session(), [prompt], max_new_tokens=4).tokens[0]
    told = [item for answer in got["ask"].answers for item in answer.logprobs or []]
    assert [answer.logprobs for answer in got["free"].answers] == [None] * len(got["free"].answers)
    logits = _session().prefill([prompt])
    for item in told:
        expected = torch.log_softmax(torch.from_numpy(logits[0]).double(), 0)
        assert [token for token, _ in item.top] == expected.topk(2).indices.tolist()
        np.testing.assert_allclose([value for _, value in item.top], expected.topk(2).values, rtol=1e-6)
        np.testing.assert_allclose(item.chosen, expected[9], rtol=1e-6)
        logits = _session().decode([9])


def test_logprobs_of_equals_by_hand() -> None:
    """log of 1/2, 1/4, 1/4: equal ones by their ids; none, and more than there are tokens."""
    logits = np.log(np.array([0.25, 0.5, 0.25], np.float32))
    item = logprobs_of(logits, 2, 2)
    np.testing.assert_allclose([item.chosen, *(value for _, value in item.top)], np.log([0.25, 0.5, 0.25]), rtol=1e-6)
    assert [token for token, _ in item.top] == [1, 0]
    assert logprobs_of(logits, 2, 0).top == []
    assert [token for token, _ in logprobs_of(logits, 2, 20).top] == [1, 0, 2]


def test_rows_that_are_not_finite_get_no_token() -> None:
    logits = np.zeros((3, 8), np.float32)
    logits[0, 3], logits[1, 4], logits[2, 5] = np.nan, np.inf, 1.0
    drawn = RequestSampler(Generate(id="a", prompt=[1], max_new_tokens=1, sampling=Sampling(temperature=1)))
    assert choose(logits, [drawn, None, None]).tolist() == [NO_TOKEN, NO_TOKEN, 5]
