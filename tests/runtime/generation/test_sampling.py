"""Sampling against hand-computed distributions and transformers' logits processors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from optc.compiler.diagnostics import GateError, UsageError
from optc.compiler.ops.library import reference
from optc.runtime.generation.sampling import Sampler, distribution, inverse
from optc.runtime.sampling import Sampling


def _logits(*probabilities: float) -> np.ndarray:
    return np.log(np.array([probabilities], np.float32))


def test_greedy_takes_the_largest_and_the_first_of_equals() -> None:
    logits = np.array([[0.0, 3.0, 1.0], [2.0, 2.0, -1.0]], np.float32)
    assert Sampler([Sampling()] * 2, [[1], [2]])(logits) == [1, 0]


def test_temperature_sharpens_by_hand() -> None:
    # softmax(log p / 0.5) is p^2, normalized: 16, 9, 1 over 26.
    found = distribution(_logits(0.5, 0.375, 0.125), Sampling(temperature=0.5))
    np.testing.assert_allclose(found, [[16 / 26, 9 / 26, 1 / 26]], atol=1e-6)


def test_top_k_by_hand_keeps_ties_of_the_last() -> None:
    found = distribution(_logits(0.4, 0.1, 0.25, 0.25), Sampling(temperature=1, top_k=2))
    np.testing.assert_allclose(found, [[0.4 / 0.9, 0, 0.25 / 0.9, 0.25 / 0.9]], atol=1e-6)


@pytest.mark.parametrize(("top_p", "kept"), [(0.3, [0]), (0.39, [0]), (0.41, [0, 2]), (0.95, [0, 1, 2, 3])])
def test_top_p_by_hand(top_p: float, kept: list[int]) -> None:
    p = np.array([0.4, 0.1, 0.3, 0.2])
    expected = np.where(np.isin(range(4), kept), p, 0)
    found = distribution(np.log(p)[None], Sampling(temperature=1, top_p=top_p))
    np.testing.assert_allclose(found[0], expected / expected.sum(), atol=1e-6)


def test_top_p_counts_after_top_k() -> None:
    # Of 0.4, 0.3 alone the first has 4/7 = 0.57 of the mass: top-p 0.5 keeps only it.
    found = distribution(_logits(0.4, 0.3, 0.2, 0.1), Sampling(temperature=1, top_k=2, top_p=0.5))
    assert found[0].tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize(("min_p", "kept"), [(0.2, [0, 2, 3]), (0.6, [0, 2]), (1.0, [0])])
def test_min_p_by_hand(min_p: float, kept: list[int]) -> None:
    p = np.array([0.4, 0.05, 0.3, 0.2])
    expected = np.where(np.isin(range(4), kept), p, 0)
    found = distribution(np.log(p)[None], Sampling(temperature=1, min_p=min_p))
    np.testing.assert_allclose(found[0], expected / expected.sum(), atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"top_k": 30}, {"top_p": 0.9}, {"top_k": 30, "top_p": 0.8}])
def test_min_p_equals_transformers(options: dict[str, float]) -> None:
    """After the other cuts."""
    scores = torch.randn(4, 500, generator=torch.Generator().manual_seed(0)) * 3
    expected = TopKLogitsWarper(int(options["top_k"]))(None, scores) if "top_k" in options else scores
    expected = TopPLogitsWarper(options["top_p"])(None, expected) if "top_p" in options else expected
    expected = MinPLogitsWarper(0.02)(None, expected)
    found = distribution(scores.numpy(), Sampling(temperature=1.0, min_p=0.02, **options))  # type: ignore[arg-type]
    assert ((found > 0) == (expected > -torch.inf).numpy()).all()
    np.testing.assert_allclose(found, expected.softmax(-1).numpy(), atol=1e-6)


def test_repetition_penalty_equals_transformers() -> None:
    """Of prompt and generated tokens."""
    prompt, scores = [3, 7, 7, 20], torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) * 3
    sampler, held = Sampler([Sampling(repetition_penalty=1.7)], [prompt]), list(prompt)
    for row in scores:
        expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([held]), row[None].clone())
        assert sampler(row[None].numpy()) == [int(expected.argmax())]
        held.append(int(expected.argmax()))


def test_penalties_of_generated_tokens_by_hand() -> None:
    """Not of the prompt's, once for their presence, and once more each time."""
    logits = np.array([[3.0, 2.6, 2.2, 0.0]], np.float32)
    presence = Sampler([Sampling(presence_penalty=0.5)], [[0]])
    assert [presence(logits)[0] for _ in range(4)] == [0, 1, 0, 0]
    frequency = Sampler([Sampling(frequency_penalty=0.5)], [[0]])
    assert [frequency(logits)[0] for _ in range(6)] == [0, 1, 0, 2, 1, 0]


def test_penalties_as_the_operator_has_them() -> None:
    """Draws of one row after another from the same distribution as `sample_`'s."""
    row = torch.randn(1, 30, generator=torch.Generator().manual_seed(1))
    sampling = Sampling(repetition_penalty=1.4, presence_penalty=0.3, frequency_penalty=0.9)
    sampler, prompt = Sampler([sampling], [[4, 5]]), [4, 5]
    seen, counts = torch.zeros(1, 30, dtype=torch.bool), torch.zeros(1, 30, dtype=torch.int32)
    seen[0, prompt] = True
    penalties = [torch.tensor([value]) for value in (1.4, 0.3, 0.9)]
    for step in range(20):
        zero, place = torch.zeros(1), torch.tensor([step])
        expected, _ = reference("sample_")(row, zero, None, None, None, *penalties, seen, counts, place, place)
        assert sampler(row.numpy()) == expected.tolist()


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
@pytest.mark.parametrize("top_k", [0, 1, 7, 50, 1000])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 1.0])
def test_equals_transformers(temperature: float, top_k: int, top_p: float) -> None:
    scores = torch.randn(4, 500, generator=torch.Generator().manual_seed(0)) * 3
    expected = TemperatureLogitsWarper(temperature)(None, scores)
    expected = TopKLogitsWarper(top_k)(None, expected) if top_k else expected
    expected = TopPLogitsWarper(top_p)(None, expected) if top_p < 1 else expected
    found = distribution(scores.numpy(), Sampling(temperature=temperature, top_k=top_k, top_p=top_p))
    assert ((found > 0) == (expected > -torch.inf).numpy()).all()
    np.testing.assert_allclose(found, expected.softmax(-1).numpy(), atol=1e-6)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.9}, {"min_p": 0.1}])
@pytest.mark.parametrize("temperature", [5e-324, 1e-46, 1e-38])
def test_temperatures_next_to_0_take_the_likeliest(temperature: float, options: dict[str, float]) -> None:
    sampling = Sampling(temperature=temperature, **options)  # type: ignore[arg-type]
    logits = np.array([[-9.0, 3.0, 17.5, 17.4]], np.float32)
    assert Sampler([sampling], [[1]])(logits) == [2]
    assert distribution(logits, sampling).tolist() == [[0, 0, 1, 0]]


@pytest.mark.filterwarnings("error")
def test_a_temperature_beyond_float32_makes_all_tokens_equally_likely() -> None:
    found = distribution(np.array([[-9.0, 3.0, 17.5]], np.float32), Sampling(temperature=1e39))
    np.testing.assert_allclose(found, [[1 / 3] * 3], atol=1e-6)


def test_draws_follow_the_distribution() -> None:
    logits = np.repeat(_logits(0.5, 0.3, 0.0001, 0.2), 4000, axis=0)
    sampler = Sampler([Sampling(temperature=1, top_k=3)] * 4000, [[row] for row in range(4000)])
    shares = np.bincount(sampler(logits), minlength=4) / 4000
    assert shares[2] == 0
    np.testing.assert_allclose(shares, [0.5, 0.3, 0, 0.2], atol=0.03)  # about four standard errors


@pytest.mark.parametrize("size", [1, 2, 2047, 2048, 2049, 2304, 5000])
def test_inversion_by_blocks_is_that_of_the_whole(size: int) -> None:
    """Weights and shares that float64 adds up exactly, so that the order of sums does not count; some weights are 0."""
    rng = np.random.default_rng(size)
    weights = (rng.integers(1, 16, size) * (rng.random(size) < 0.7)).astype(np.float32)
    weights[size // 2] = 3
    cumulative = np.cumsum(weights, dtype=np.float64)
    edges = cumulative[:-1] / cumulative[-1]
    exact = edges[edges * cumulative[-1] == cumulative[:-1]]
    for uniform in (0.0, 1 - 2.0**-53, *exact.tolist()[:40], *rng.random(40).tolist()):
        share = min(uniform * cumulative[-1], np.nextafter(cumulative[-1], 0))
        assert inverse(weights, uniform) == np.searchsorted(cumulative, share, side="right")


def test_inversion_never_takes_what_has_no_weight() -> None:
    """Tiny weights behind a large one, where sums round."""
    weights = np.full(2304, 1e-20, np.float32)
    weights[0], weights[600:] = 1, 0
    assert inverse(weights, 1 - 2.0**-53) < 600
    weights[:] = 0
    weights[700] = 1e-38
    assert {inverse(weights, uniform) for uniform in (0.0, 0.5, 1 - 2.0**-53)} == {700}


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    logits = np.zeros((1, 1000), np.float32)
    sampling = Sampling(temperature=1, seed=7)
    alone = [Sampler([sampling], [[5, 6]])(logits)[0] for _ in range(2)]
    batch = Sampler([sampling] * 3, [[9], [5, 6], [5, 6]])(np.repeat(logits, 3, axis=0))
    assert alone[0] == alone[1] == batch[1]
    assert batch[2] != batch[1], "equal prompts draw differently"
    assert Sampler([Sampling(temperature=1, seed=8)], [[5, 6]])(logits)[0] != alone[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.5}, "temperature -0.5 is out of range"),
        ({"temperature": float("nan")}, "temperature nan is out of range"),
        ({"temperature": float("inf")}, "temperature inf is out of range"),
        ({"temperature": 1.0, "top_k": -1}, "top-k -1 is out of range"),
        ({"temperature": 1.0, "top_p": 0.0}, "top-p 0.0 is out of range"),
        ({"temperature": 1.0, "top_p": 1.1}, "top-p 1.1 is out of range"),
        ({"temperature": 1.0, "min_p": 1.1}, "min-p 1.1 is out of range"),
        ({"min_p": 0.1}, "top-k, top-p and min-p have no effect at temperature 0"),
        ({"repetition_penalty": 0.0}, "repetition-penalty 0.0 is out of range"),
        ({"presence_penalty": float("nan")}, "presence-penalty nan is out of range"),
        ({"frequency_penalty": 101.0}, "frequency-penalty 101.0 is out of range"),
        ({"seed": -1}, "seed -1 is out of range"),
        ({"top_k": 5}, "top-k, top-p and min-p have no effect at temperature 0"),
    ],
)
def test_refuses(options: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Sampling(**options)  # type: ignore[arg-type]
    assert caught.value.what == message


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_not_finite_are_named(temperature: float, bad: float) -> None:
    logits = np.zeros((2, 4), np.float32)
    logits[1, 2] = bad
    with pytest.raises(GateError) as caught:
        Sampler([Sampling(temperature=temperature)] * 2, [[1], [2]])(logits)
    assert caught.value.where == "row 1, token 2"


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize(
    "options", [{"temperature": 1e-38}, {"repetition_penalty": 0.01}, {"temperature": 1.0, "repetition_penalty": 0.01}]
)
def test_scores_that_overflow_are_named(options: dict[str, float]) -> None:
    """As the device says it; no token outside the vocabulary is chosen."""
    logits = np.array([[0.0, 3e37, 1.0]], np.float32)
    with pytest.raises(GateError) as caught:
        Sampler([Sampling(**options)], [[1]])(logits)  # type: ignore[arg-type]
    assert caught.value.where == "row 0, token 1, after penalties and temperature"
