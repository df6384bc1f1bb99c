"""Prompts with padding through the kernels of a whole program, in Triton's interpreter: against the references without."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from cuda_sessions import compiled
from interpreted import HAS_GPU
from stages import sequences

from optc.compiler.kernels.cuda.dispatch import call
from optc.compiler.kernels.kernel import kernels_for
from optc.runtime.sessions.cuda import CudaSession
from optc.runtime.sessions.cuda_memory import MemoryPlan


@pytest.fixture
def interpreted_kernels() -> Iterator[set[str]]:
    """Every kernel stands behind its op on the CPU; the ops that were called."""
    library, called = torch.library.Library("optc", "IMPL"), set[str]()

    def noted(kernel, *args, **kwargs):  # type: ignore[no-untyped-def]
        called.add(kernel.op)
        return call(kernel, *args, **kwargs)

    for kernel in kernels_for("cuda"):
        library.impl(kernel.op, functools.partial(noted, kernel), "CPU")
    yield called
    library._destroy()


def session(prompt_tokens: int, family: str) -> CudaSession:
    """Of Gemma 2 two layers, one with a window and one without; of the others one."""
    plan = MemoryPlan(weights=0, working=0, pool=0, num_blocks=4, prompt_tokens=prompt_tokens)
    return CudaSession(compiled(family, 2 if family == "gemma2" else 1), plan)


@pytest.mark.skipif(HAS_GPU, reason="Triton does not interpret where there is a GPU; see tests/gpu")
@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(name, marks=pytest.mark.slow) for name in ("gemma2", "mixtral"))]
)
def test_padding_leaves_no_trace(family: str, request: pytest.FixtureRequest) -> None:
    """Of 16 tokens 3 are padding, and of 4 requests two have no tokens; for Llama then 1 of 16, and of a length that is 1."""
    ours, theirs = session(16, family), session(0, family)
    batches = [sequences(9, 4), *([sequences(1, 14)] if family == "llama" else [])]
    expected = [theirs.prefill(prompts) for prompts in batches]
    called = request.getfixturevalue("interpreted_kernels")
    for prompts, logits in zip(batches, expected, strict=True):
        np.testing.assert_allclose(ours.prefill(prompts), logits, atol=5e-5)
    for pool, other in zip(ours._pools, theirs._pools, strict=True):
        torch.testing.assert_close(pool, other, atol=5e-5, rtol=0)
    assert called >= {"fused_linear", "rotary_paged_attention_", "select_rows"}
    assert set(ours._prompts) == {(16, 4)}
