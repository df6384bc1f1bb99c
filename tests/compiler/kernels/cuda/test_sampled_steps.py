"""Decode steps of a session that end with the kernels of `sample_` and `advance_step_`, in Triton's interpreter."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
from cuda_sessions import LENGTHS, MIXED, PENALIZED, compiled
from interpreted import HAS_GPU
from stages import sequences

from optc.compiler.kernels.cuda.dispatch import call
from optc.compiler.kernels.cuda.greedy_step import ADVANCE_STEP
from optc.compiler.kernels.cuda.sampler import SAMPLE
from optc.runtime.generation.generate import generate
from optc.runtime.sampling import Sampling
from optc.runtime.sessions.cuda import CudaSession
from optc.runtime.sessions.cuda_memory import MemoryPlan


@pytest.fixture
def interpreted_kernels() -> Iterator[None]:
    """Both kernels stand behind their ops on the CPU."""
    library = torch.library.Library("optc", "IMPL")
    for kernel in (SAMPLE, ADVANCE_STEP):
        library.impl(kernel.op, functools.partial(call, kernel), "CPU")
    yield
    library._destroy()


def tokens(samplings: list[Sampling]) -> list[list[int]]:
    session = CudaSession(compiled(), MemoryPlan(weights=0, working=0, pool=0, num_blocks=16))
    return generate(session, sequences(*LENGTHS), max_new_tokens=6, sampling=samplings).tokens


@pytest.mark.skipif(HAS_GPU, reason="Triton does not interpret where there is a GPU; see tests/gpu")
@pytest.mark.parametrize("samplings", [MIXED, PENALIZED])
def test_steps_draw_what_those_of_the_references_do(samplings: list[Sampling], request: pytest.FixtureRequest) -> None:
    """Over a block's end, with a place that is padding."""
    expected = tokens(samplings)
    request.getfixturevalue("interpreted_kernels")
    assert tokens(samplings) == expected
