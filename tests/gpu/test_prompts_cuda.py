"""Prompts on a GPU: captured calls, padded, against calls of their own sizes, and against themselves."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from cuda_sessions import LENGTHS, compiled
from stages import sequences

from optc.compiler.ir.devices import to_device
from optc.runtime.generation.generate import generate
from optc.runtime.sessions.cuda import CudaSession
from optc.runtime.sessions.cuda_memory import MemoryPlan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CLOSE = 2e-4
"""Of logits in float32: products of other numbers of rows are summed in another order."""


def session(prompt_tokens: int, family: str = "llama") -> CudaSession:
    program = to_device(compiled(family), torch.device("cuda", torch.cuda.current_device()))
    plan = MemoryPlan(weights=0, working=0, pool=0, num_blocks=40, prompt_tokens=prompt_tokens)
    return CudaSession(program, plan)


@functools.cache
def ours() -> CudaSession:
    return session(256)


@functools.cache
def theirs() -> CudaSession:
    return session(0)


def test_a_replayed_call_computes_what_the_first_one_did() -> None:
    """Bit for bit, and with steps and other prompts between."""
    prompts = sequences(40, 11)
    first = ours().prefill(prompts)
    captured = ours().prefill(prompts)
    generate(ours(), sequences(50, 9, 20), max_new_tokens=5)
    np.testing.assert_array_equal(captured, first)
    np.testing.assert_array_equal(ours().prefill(prompts), first)
    assert not theirs()._prompts


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_ragged_prompts(family: str) -> None:
    one, other = session(256, family), session(0, family)
    for turn in range(3):
        prompts = [[(token + turn) % 128 for token in row] for row in sequences(*LENGTHS)]
        np.testing.assert_allclose(one.prefill(prompts), other.prefill(prompts), atol=CLOSE)
        for pool, expected in zip(one._pools, other._pools, strict=True):
            torch.testing.assert_close(pool, expected, atol=CLOSE, rtol=0)
    assert len(one._prompts) == 1


def test_prompts_of_three_lengths_in_one_call() -> None:
    for length in (64, 33, 50, 57):
        (prompt,) = sequences(length)
        np.testing.assert_allclose(ours().prefill([prompt]), theirs().prefill([prompt]), atol=CLOSE)
        found, expected = (generate(one, [prompt], max_new_tokens=20).tokens for one in (ours(), theirs()))
        assert found == expected


def test_prompts_that_begin_with_blocks_of_the_pool() -> None:
    one, other = session(256), session(0)
    beginning, *ends = sequences(128, 5, 40, 64, 1)
    for batch in ([0], [1], [2], [0, 1], [3, 2, 1], [0, 1, 2], [2, 0, 3]):
        prompts = [beginning + ends[place] for place in batch]
        np.testing.assert_allclose(one.prefill(prompts), other.prefill(prompts), atol=CLOSE)
        assert one.pool_use == other.pool_use
    assert one.pool_use.reused_tokens == 13 * 128
