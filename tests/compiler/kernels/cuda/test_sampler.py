"""The Triton kernels that choose tokens against the references, in the interpreter or on the GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from interpreted import DEVICE, FLOATS, HAS_GPU, ON_GPU
from torch import Tensor

from optc.compiler.kernels.cuda.sampler import accepts
from optc.compiler.kernels.cuda.sampling.launch import argmax, sample_
from optc.compiler.ops.dialect.sampling import NO_TOKEN
from optc.compiler.ops.library import reference

SMALL = {"chunk": 128, "block": 128}
VOCABULARY = 300
ROWS: list[dict[str, float]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 1},
    {"temperature": 1.3, "top_k": 4},
    {"temperature": 1.3, "top_k": 40},
    {"temperature": 1.0, "top_k": 999},
    {"temperature": 2.0, "top_p": 0.3},
    {"temperature": 1.0, "top_p": 0.95},
    {"temperature": 1.0, "top_p": 0.999},
    {"temperature": 1.5, "min_p": 0.2},
    {"temperature": 1.5, "top_k": 50, "top_p": 0.8},
    {"temperature": 1.5, "top_k": 50, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 0.0, "repetition_penalty": 3.0, "presence_penalty": 1.0},
    {"temperature": 1.0, "repetition_penalty": 0.7, "frequency_penalty": 0.9, "top_k": 20},
]
OFF = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}  # fmt: skip


def parameters(rows: list[dict[str, float]], vocabulary: int, seed: int) -> list[Tensor]:
    """Arguments of `sample_` behind the logits."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(-8, 4, (len(rows), vocabulary), generator=generator, dtype=torch.int32).clamp_(min=0)
    columns = [torch.tensor([row["temperature"] for row in rows])]
    for name, value in OFF.items():
        kind = torch.int32 if name == "top_k" else torch.float32
        columns.append(torch.tensor([row.get(name, value) for row in rows], dtype=kind))
    seeds = torch.arange(len(rows)) * 7919 + (seed << 33)
    return [*columns, counts > 0, counts, seeds, torch.full((len(rows),), seed + 2**31)]


def logits_of(rows: int, vocabulary: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocabulary, generator=generator) * 3
    logits[:, 5] = float("-inf")
    return logits


def compare(logits: Tensor, arguments: list[Any], **sizes: int) -> None:
    """Tokens, log probabilities and updated tables."""
    theirs = [None if item is None else item.clone() for item in arguments]
    mine = [None if item is None else item.clone().to(DEVICE) for item in arguments]
    tokens, logprobs = sample_(logits.to(DEVICE), *mine, **sizes)
    expected, expected_logprobs = reference("sample_")(logits, *theirs)
    assert tokens.tolist() == expected.tolist()
    torch.testing.assert_close(logprobs.cpu(), expected_logprobs, rtol=1e-5, atol=1e-5, equal_nan=True)
    for found, wanted in zip(mine[7:9], theirs[7:9], strict=True):
        assert found is wanted is None or torch.equal(found.cpu(), wanted)


@pytest.mark.parametrize("seed", [8, *(pytest.param(seed, marks=ON_GPU) for seed in range(9, 20))])
def test_equals_reference(seed: int) -> None:
    """Rows with all kinds of parameters in one batch; the seeds fill 64 bits, the steps 32."""
    logits = logits_of(len(ROWS), VOCABULARY, seed)
    logits[1, 3] = float("nan")
    logits[2] = float("-inf")
    logits[4, 290:] = 7.0  # equals at the cut
    compare(logits, parameters(ROWS, VOCABULARY, seed), **SMALL)


@pytest.mark.parametrize("dtype", FLOATS)
def test_without_options(dtype: torch.dtype) -> None:
    """No cuts and no penalties at all, logits in every type and in rows that are slices."""
    rows = ROWS[:3]
    arguments: list[Any] = parameters(rows, VOCABULARY, 3)
    arguments[1:9] = [None] * 8
    logits = logits_of(3, 2 * VOCABULARY, 3)[:, VOCABULARY:].to(dtype)
    logits[:, 100:].clamp_(max=4)
    compare(logits, arguments, **SMALL)


def test_few_cuts() -> None:
    """top-p alone, and a table that is updated without a penalty."""
    arguments: list[Any] = parameters(ROWS[6:9], VOCABULARY, 4)
    arguments[1] = arguments[3] = arguments[4] = arguments[5] = arguments[6] = None
    compare(logits_of(3, VOCABULARY, 4), arguments, **SMALL)


SHAPES = {
    "all equal": lambda noise: noise * 0,
    "nearly equal": lambda noise: noise * 1e-3,
    "far apart": lambda noise: noise * 1e4,
    "a peak above the flat": lambda noise: noise * 0.1 + 20 * (torch.arange(len(noise)) == 77),
    "two levels": lambda noise: (noise > 1).float() * 3,
    "few that can be": lambda noise: torch.where(noise > 1.8, noise, float("-inf")),
    "coarse": lambda noise: (noise * 4).round() / 2,
}


CUTS: list[dict[str, float]] = [
    *({"top_k": most} for most in (1, 7, 250)),
    *({"top_p": share} for share in (1e-6, 0.5, 0.99, 1 - 1e-6)),
    {"top_k": 30, "top_p": 0.5},
    {"top_p": 0.9, "min_p": 0.1},
    {"min_p": 1.0},
]


@pytest.mark.parametrize("draw", [0, *(pytest.param(draw, marks=ON_GPU) for draw in range(1, 20))])
def test_cuts_of_any_distribution(draw: int) -> None:
    """Bounds that count tokens are right of every distribution: lists are long, short or empty. Interpreted: a third."""
    noise = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(11 + draw))
    pairs = [(shape(noise), cut) for shape in SHAPES.values() for cut in CUTS][:: 1 if HAS_GPU else 3]
    arguments: list[Any] = parameters([{"temperature": 0.9, **cut} for _, cut in pairs], VOCABULARY, draw)
    arguments[4:9] = [None] * 5
    compare(torch.stack([logits for logits, _ in pairs]), arguments, **SMALL)


@pytest.mark.parametrize("vocabulary", [1, 127, 128, 300])
def test_argmax(vocabulary: int) -> None:
    logits = torch.randn(6, vocabulary, generator=torch.Generator().manual_seed(5))
    logits[0] = 2.0
    logits[1, -1] = 50.0
    logits[2, vocabulary // 2] = float("nan")
    logits[3, -1] = float("inf")
    logits[4] = float("-inf")
    logits[5, 0] = 1.0
    found = argmax(logits.to(DEVICE), chunk=128)
    assert found.tolist() == reference("argmax")(logits).tolist()
    assert found[:5].tolist() == [0, vocabulary - 1, NO_TOKEN, NO_TOKEN, NO_TOKEN]


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("vocabulary", [50257, 128256, 262144])
@pytest.mark.parametrize("scale", [0.01, 1.0])
def test_real_sizes(vocabulary: int, scale: float) -> None:
    """Flat rows too, of which cuts leave long lists. The ops reach the kernels."""
    logits = logits_of(len(ROWS), vocabulary, 6) * scale
    compare(logits, parameters(ROWS, vocabulary, 6))
    assert torch.equal(torch.ops.optc.argmax(logits.to(DEVICE)).cpu(), reference("argmax")(logits))


@pytest.mark.parametrize(
    ("index", "value", "reason"),
    [
        (0, torch.zeros(2, 4), None),
        (0, torch.zeros(2, 4).double(), "logits of type float64; the kernel takes float32, bfloat16, float16"),
        (2, torch.zeros(2), "argument 2 is torch.float32; the kernel takes torch.int32"),
        (9, torch.zeros(4, 2, dtype=torch.int32).T, "the tables of seen tokens and counts are not contiguous"),
    ],
)
def test_says_what_it_takes(index: int, value: Tensor, reason: str | None) -> None:
    args: list[Any] = [torch.zeros(2, 4), *parameters(ROWS[:2], 4, 0)]
    args[index] = value
    assert accepts(args, {}) == reason
