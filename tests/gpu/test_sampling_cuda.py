"""Sessions on a GPU that draw tokens: captured steps against the operator's reference, and calls that are refused."""

from __future__ import annotations

import functools

import pytest
import torch
from cuda_sessions import LENGTHS, MIXED, PENALIZED, compiled, drawn
from stages import sequences

from optc.compiler.ir.devices import to_device
from optc.compiler.kernels.cuda.dispatch import KernelRefusalError, kernels_only
from optc.compiler.kernels.kernel import without_kernel
from optc.runtime.generation.generate import generate
from optc.runtime.generation.sampling import draws_of
from optc.runtime.sampling import Sampling
from optc.runtime.sessions.cuda import CudaSession
from optc.runtime.sessions.cuda_memory import MemoryPlan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
COUNT = 40


@functools.cache
def session() -> CudaSession:
    program = to_device(compiled(), torch.device("cuda", torch.cuda.current_device()))
    assert without_kernel(program, "cuda") == []
    return CudaSession(program, MemoryPlan(weights=0, working=0, pool=0, num_blocks=16))


@pytest.mark.parametrize("samplings", [MIXED, PENALIZED])
def test_steps_draw_what_the_reference_does(samplings: list[Sampling]) -> None:
    """From logits of the same captured program, brought to the host; the same once more, and divided otherwise."""
    ours, prompts = session(), sequences(*LENGTHS)
    found = generate(ours, prompts, max_new_tokens=COUNT, sampling=samplings).tokens
    assert found == drawn(ours, prompts, samplings, COUNT)
    greedy = generate(ours, prompts, max_new_tokens=COUNT).tokens
    assert (found[1] == greedy[1]) == (samplings is MIXED)
    assert found == generate(ours, prompts, max_new_tokens=COUNT, sampling=samplings).tokens
    draws = draws_of(samplings, prompts)
    parts = [list[int | None](ours.choose(ours.prefill(prompts), draws))]
    for count in (1, 3, COUNT - 5):
        parts += list(ours.stream(parts[-1], count, draws))
    assert [list(row) for row in zip(*parts, strict=True)] == found


def test_rows_that_stop() -> None:
    ours, prompts = session(), sequences(*LENGTHS)
    whole = generate(ours, prompts, max_new_tokens=COUNT, sampling=MIXED).tokens
    stop = whole[0][7]
    found = generate(ours, prompts, max_new_tokens=COUNT, sampling=MIXED, stop_ids=(stop,)).tokens
    assert found == [row[: row.index(stop) + 1] if stop in row else row for row in whole]


def test_one_captured_step_serves_all_parameters() -> None:
    ours, prompts = session(), sequences(21, 9)
    greedy = generate(ours, prompts, max_new_tokens=9).tokens
    assert generate(ours, prompts, max_new_tokens=9, sampling=Sampling(temperature=1.0)).tokens != greedy
    held = len(ours._steps)
    assert generate(ours, prompts, max_new_tokens=9, sampling=Sampling(temperature=3.0, top_k=1)).tokens == greedy
    assert generate(ours, prompts, max_new_tokens=9, sampling=Sampling(temperature=1.0, top_p=1e-30)).tokens == greedy
    assert len(ours._steps) == held


def test_what_no_kernel_takes_is_refused_where_kernels_are_asked_for() -> None:
    logits = torch.randn(2, 16, device="cuda", dtype=torch.float64)
    assert torch.ops.optc.argmax(logits).tolist() == logits.argmax(1).tolist()
    with pytest.raises(KernelRefusalError, match="the kernel of optc::argmax does not take") as caught, kernels_only():
        torch.ops.optc.argmax(logits)
    assert caught.value.why == "logits of type float64; the kernel takes float32, bfloat16, float16"
