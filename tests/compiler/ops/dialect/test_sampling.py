"""sample_ and argmax: Philox by its published vectors, cuts by hand and by runtime/generation/sampling.py, the draw by
its distribution."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from optc.compiler.ops.dialect.sampling import NO_TOKEN, exponential, kept, philox
from optc.runtime.generation.sampling import distribution
from optc.runtime.sampling import Sampling

_optc = torch.ops.optc
LN = {share: float(np.log(share)) for share in (0.05, 0.1, 0.15, 0.2, 0.5)}
HAND = torch.tensor([[LN[0.1], LN[0.5], LN[0.05], LN[0.2], LN[0.15]]])
"""Logits of which the probabilities are 0.1, 0.5, 0.05, 0.2, 0.15."""


def sample(logits: Tensor, temperature: float = 1.0, seed: int = 0, step: int = 0, **options: Any) -> Any:
    """One call in which each row has the same options, and the seeds seed, seed + 1, ..."""
    rows = len(logits)
    names = ("top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    kinds = {"top_k": torch.int32}
    cuts = [
        torch.full((rows,), options[name], dtype=kinds.get(name, torch.float32)) if name in options else None
        for name in names
    ]
    tables = (options.get("seen"), options.get("counts"))
    heat, seeds, steps = torch.full((rows,), temperature), torch.arange(rows) + seed, torch.full((rows,), step)
    return _optc.sample_(logits, heat, *cuts, *tables, seeds, steps)


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (-1, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            0x299F31D0A4093822,
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_by_the_vectors_of_random123(key: int, counter: Any, expected: Any) -> None:
    found = philox(torch.tensor([key]), tuple(torch.tensor([word]) for word in counter))  # type: ignore[arg-type]
    assert tuple(int(word) for word in found) == expected


def test_exponential_numbers() -> None:
    """Mean and variance 1, never 0 or infinite, and other ones for another step or seed."""
    numbers = exponential(torch.tensor([1, 1, 2]), torch.tensor([5, 6, 5]), 20000)
    assert torch.isfinite(numbers).all()
    assert (numbers > 0).all()
    assert numbers.mean(1).sub(1).abs().max() < 0.03
    assert numbers.var(1).sub(1).abs().max() < 0.06
    assert len({tuple(row[:4].tolist()) for row in numbers}) == 3


@pytest.mark.parametrize(
    ("cuts", "tokens"),
    [
        ((0, 1.0, 0.0), {0, 1, 2, 3, 4}),
        ((2, 1.0, 0.0), {1, 3}),
        ((9, 1.0, 0.0), {0, 1, 2, 3, 4}),
        ((0, 0.45, 0.0), {1}),
        ((0, 0.6, 0.0), {1, 3}),
        ((0, 0.8, 0.0), {1, 3, 4}),
        ((3, 0.8, 0.0), {1, 3}),  # of 0.5, 0.2, 0.15 the first two are 0.82
        ((0, 1e-9, 0.0), {1}),
        ((0, 1.0, 0.25), {1, 3, 4}),
        ((0, 0.6, 0.5), {1}),
    ],
)
def test_cuts_by_hand(cuts: tuple[int, float, float], tokens: set[int]) -> None:
    assert set(kept(HAND[0], *cuts).nonzero().flatten().tolist()) == tokens


def test_equals_stay_together() -> None:
    scores = torch.tensor([1.0, 2.0, 2.0, 2.0, 0.0])
    assert kept(scores, 1, 1.0, 0.0).tolist() == [False, True, True, True, False]
    assert kept(scores, 0, 0.1, 0.0).tolist() == [False, True, True, True, False]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1.0),
        Sampling(temperature=0.7, top_k=5),
        Sampling(temperature=1.3, top_p=0.8),
        Sampling(temperature=2.0, top_k=9, top_p=0.7),
        Sampling(temperature=2.0, top_k=9, top_p=0.9, min_p=0.2),
    ],
)
def test_draws_follow_the_host_sampler(sampling: Sampling) -> None:
    """The same tokens can be drawn, each as often as its probability says (chi-squared, 0.1 % point of 19 at most)."""
    row, draws = torch.randn(1, 20, generator=torch.Generator().manual_seed(3)) * 2, 1600
    expected = distribution(row.numpy(), sampling)[0]
    cuts = {"top_k": sampling.top_k, "top_p": sampling.top_p, "min_p": sampling.min_p}
    tokens, logprobs = sample(row.expand(draws, -1), sampling.temperature, seed=11, **cuts)
    found = torch.bincount(tokens, minlength=20).numpy()
    assert set(np.flatnonzero(found)) <= set(np.flatnonzero(expected))
    likely = expected * draws >= 5
    spread = ((found - expected * draws) ** 2)[likely] / (expected * draws)[likely]
    assert spread.sum() < 43.8
    torch.testing.assert_close(logprobs, torch.log_softmax(row[0], 0)[tokens])


def test_seed_and_step_fix_the_token() -> None:
    rows = torch.zeros(6, 1000)
    first, _ = sample(rows, seed=5, step=3)
    assert torch.equal(sample(rows, seed=5, step=3)[0], first)
    assert torch.equal(sample(rows[2:], seed=7, step=3)[0], first[2:]), "a row does not depend on the others"
    assert not torch.equal(sample(rows, seed=5, step=4)[0], first)
    assert len(set(first.tolist())) == 6
    assert first.tolist() == [898, 848, 143, 432, 369, 73]


def test_penalties_by_hand() -> None:
    """Greedy: the largest after penalties. Seen: positive logits are divided, negative ones multiplied."""
    logits = torch.tensor([[3.0, 2.0, -1.0, 1.8]])
    seen = torch.tensor([[True, False, True, False]])
    assert sample(logits.clone(), 0.0, repetition_penalty=1.4, seen=seen)[0].tolist() == [0]
    assert seen.tolist() == [[True, False, True, False]]
    assert sample(logits.clone(), 0.0, repetition_penalty=1.6, seen=seen)[0].tolist() == [1]
    assert seen.tolist() == [[True, True, True, False]]
    assert sample(-logits, 0.0, repetition_penalty=4.0, seen=seen)[0].tolist() == [2], "1 / 4 is above -1.8"
    counts = torch.tensor([[2, 1, 0, 0]], dtype=torch.int32)
    chosen = [
        sample(logits, 0.0, presence_penalty=a, frequency_penalty=b, counts=counts.clone())[0].item()
        for a, b in ((0.0, 0.4), (0.0, 0.6), (1.1, 0.0), (1.3, 0.0), (0.9, 0.2), (0.3, 0.3))
    ]
    assert chosen == [0, 0, 0, 3, 3, 0]
    sample(logits, 0.0, presence_penalty=0.0, counts=counts)
    assert counts.tolist() == [[3, 1, 0, 0]]


def test_greedy_and_rows_without_a_token() -> None:
    logits = torch.tensor([[1.0, 4.0, 4.0], [1.0, float("nan"), 2.0], [1.0, float("inf"), 2.0], [-float("inf")] * 3])
    logits = torch.cat([logits, torch.tensor([[-float("inf"), -3.0, -4.0]])])
    assert _optc.argmax(logits).tolist() == [1, NO_TOKEN, NO_TOKEN, NO_TOKEN, 1]
    assert _optc.argmax(logits.bfloat16().T.contiguous().T.requires_grad_()).tolist() == [1, *[NO_TOKEN] * 3, 1]
    close = torch.tensor([[1.0, 1.0 + 1e-12], [1e300, 1e301]], dtype=torch.float64)  # equals, and infinite, in float32
    assert _optc.argmax(close).tolist() == [1, 1]
    tokens, logprobs = sample(logits, 0.0)
    assert tokens.tolist() == [1, NO_TOKEN, NO_TOKEN, NO_TOKEN, 1]
    assert torch.isnan(logprobs).tolist() == [False, True, True, True, False]
