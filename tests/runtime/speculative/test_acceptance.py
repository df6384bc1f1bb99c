"""Acceptance in tensors: beside the host's sampler, by hand, and by the distribution of what it gives."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from optc.compiler.ops.dialect.sampling import NO_TOKEN
from optc.runtime.generation.sampling import distribution, row_sampler
from optc.runtime.sampling import Sampling
from optc.runtime.speculative.acceptance import NOT_DRAFTED, Cuts, accept, decide, drawable

SAMPLINGS = [
    Sampling(),
    Sampling(temperature=1.0),
    Sampling(temperature=0.3, top_k=3),
    Sampling(temperature=1.7, top_p=0.6),
    Sampling(temperature=1.0, min_p=0.2),
    Sampling(temperature=2.0, top_k=9, top_p=0.8, min_p=0.05),
    Sampling(temperature=1.0, top_k=100),
    Sampling(temperature=1e-35),
]


def cuts(samplings: list[Sampling]) -> Cuts:
    return Cuts.of(samplings, torch.device("cpu"))


def test_distributions_are_those_of_the_host() -> None:
    """Rows of all kinds in one call, equals among their scores."""
    logits = np.random.default_rng(0).normal(size=(len(SAMPLINGS), 40)).astype(np.float32) * 3
    logits[:, 10:20] = logits[:, :10]
    found = drawable(torch.from_numpy(logits), cuts(SAMPLINGS)).double()
    found /= found.sum(1, keepdim=True)
    for row, sampling in enumerate(SAMPLINGS):
        if not sampling.greedy:
            np.testing.assert_allclose(found[row], distribution(logits[row][None], sampling)[0], atol=1e-6)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_tokens_are_those_that_the_host_draws_one_by_one(sampling: Sampling) -> None:
    logits = np.random.default_rng(1).normal(size=(200, 50)).astype(np.float32) * 2
    one_by_one, ahead = (row_sampler(sampling, [1, 2, 3]) for _ in range(2))
    expected = [one_by_one(row, int(row.argmax())) for row in logits]
    for start in range(0, 200, 10):  # 14 numbers are asked for, and 10 used
        uniforms = torch.from_numpy(ahead.uniforms(14))[:10]
        found = decide(torch.from_numpy(logits[start : start + 10]), cuts([sampling] * 10), uniforms).tolist()
        assert found == expected[start : start + 10]
        ahead.take(found)


def test_what_is_not_finite_gives_no_token() -> None:
    scores = torch.zeros(4, 3)
    scores[0, 1], scores[1], scores[2, 2] = float("nan"), -float("inf"), float("inf")
    for sampling in (Sampling(), Sampling(temperature=0.5)):
        found = decide(scores, cuts([sampling] * 4), torch.full((4,), 0.1, dtype=torch.float64))
        assert found.tolist() == [NO_TOKEN] * 3 + [0]


def test_a_draft_is_kept_as_far_as_it_is_what_was_decided() -> None:
    drafts = [[5, 6, 7], [], [5, 6], [4], [5]]
    decided = [[5, 6, 9, 8], [3], [5, 6, 1], [5, 2], [NO_TOKEN, 1]]
    laid = [token for draft in drafts for token in [*draft, NOT_DRAFTED]]
    flat = np.array(list(itertools.chain(*decided)))
    tokens, counts = accept(flat, np.array(laid), np.array([len(row) for row in decided]))
    assert counts.tolist() == [3, 1, 3, 1, 1]
    assert [row[: len(own)] for row, own in zip(tokens.tolist(), decided, strict=True)] == decided
    assert tokens.shape == (5, 4)
