"""Sessions of the CUDA target: all but kernels and captured graphs, on the CPU, by the operators' references."""

from __future__ import annotations

import ast
import dataclasses
import functools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from artifacts import make_manifest
from cuda_sessions import LENGTHS, MIXED, PENALIZED, compiled, drawn
from rewrites import stirred
from stages import apply, sequences

from optc.compiler.diagnostics import GateError, InputError, ResourceError, TargetError
from optc.compiler.kernels.cuda.dispatch import KernelRefusalError
from optc.compiler.kernels.cuda.dispatch import call as call_kernel
from optc.compiler.kernels.cuda.fused_linear import FUSED_LINEAR
from optc.compiler.kernels.kernel import Kernel, kernels_for
from optc.passes.fusion.rotary import FuseRotary
from optc.passes.kv_cache.paged import PageKVCache
from optc.runtime.generation.generate import generate
from optc.runtime.generation.sampling import chooser, draws_of
from optc.runtime.sampling import Sampling
from optc.runtime.sessions import cuda
from optc.runtime.sessions.cuda import CudaSession
from optc.runtime.sessions.cuda_memory import MemoryPlan, plan_memory
from optc.runtime.sessions.program import open_program
from optc.runtime.sessions.session import Session, SessionOptions
from optc.runtime.sessions.streaming import Draw
from optc.targets.inductor_cuda import BLOCK_SIZE


def session(num_blocks: int = 16, family: str = "llama") -> CudaSession:
    return CudaSession(compiled(family), MemoryPlan(weights=0, working=0, pool=0, num_blocks=num_blocks))


def reference() -> Session:
    return open_program(stirred("llama"))


def test_it_chooses_what_the_captured_program_does() -> None:
    """Rows of unequal length over a block's end, some of which stop; the cache is the same afterwards."""
    prompts = sequences(*LENGTHS)
    ours, theirs = session(), reference()
    expected = generate(theirs, prompts, max_new_tokens=70)
    stop = expected.tokens[0][20]
    for stop_ids in ((), (stop,)):
        expected = generate(theirs, prompts, max_new_tokens=70, stop_ids=stop_ids)
        found = generate(ours, prompts, max_new_tokens=70, stop_ids=stop_ids)
        assert (found.tokens, found.stop) == (expected.tokens, expected.stop)
        assert ours.lengths == theirs.lengths
    assert {(step.batch, step.width * BLOCK_SIZE) for step in ours._steps.values()} == {(4, 256)}


def test_logits_after_a_stream_that_was_left_early() -> None:
    """What ran ahead is not in the cache."""
    prompts = sequences(*LENGTHS)
    ours, theirs = session(), reference()
    first = [int(row.argmax()) for row in ours.prefill(prompts)]
    theirs.prefill(prompts)
    stream = ours.stream(first, 30)
    second, third = next(stream), next(stream)
    stream.close()
    assert ours.lengths == [length + 2 for length in LENGTHS]
    theirs.decode(first)
    assert [int(row.argmax()) for row in theirs.decode(second)] == third
    other = [(token + 1) % 128 for token in third]
    np.testing.assert_allclose(ours.decode(other), theirs.decode(other), atol=2e-5)
    ours.rewind([length + 1 for length in LENGTHS])
    theirs.rewind([length + 1 for length in LENGTHS])
    np.testing.assert_allclose(ours.decode(other), theirs.decode(other), atol=2e-5)


def test_scores_are_of_every_token() -> None:
    row = sequences(40)[0]
    found, expected = (np.concatenate(list(one.score(row))) for one in (session(), reference()))
    assert found.shape == (40, 128)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_a_full_context_and_a_full_pool() -> None:
    ours = session(4)
    prompt = sequences(250)
    result = generate(ours, prompt, max_new_tokens=20)
    assert (result.stop, len(result.tokens[0])) == (["context"], 7)
    with pytest.raises(InputError, match="a row of 257 tokens does not fit the context of 256"):
        next(ours.stream([5], 1))
    with pytest.raises(ResourceError, match="the KV pool is out of blocks"):
        generate(session(1), [prompt[0][:60]], max_new_tokens=20)


@pytest.mark.parametrize("samplings", [MIXED, PENALIZED])
def test_it_draws_what_the_operator_says(samplings: list[Sampling]) -> None:
    """Rows of three kinds over a block's end; a greedy one is what it is without the others, and so is each alone."""
    prompts = sequences(*LENGTHS)
    ours = session()
    found = generate(ours, prompts, max_new_tokens=40, sampling=samplings).tokens
    assert found == drawn(reference(), prompts, samplings, 40)
    greedy = generate(ours, prompts, max_new_tokens=40).tokens
    assert (found[1] == greedy[1]) == (samplings is MIXED)
    alone = [
        generate(ours, [row], max_new_tokens=40, sampling=one).tokens[0]
        for row, one in zip(prompts, samplings, strict=True)
    ]
    assert found == alone
    other = [dataclasses.replace(one, seed=one.seed + 1) for one in samplings]
    again = generate(ours, prompts, max_new_tokens=40, sampling=other).tokens
    assert [one == two for one, two in zip(found, again, strict=True)] == [False, True, False]
    assert generate(ours, prompts, max_new_tokens=40, sampling=samplings).tokens == found


@pytest.mark.parametrize("samplings", [MIXED, PENALIZED])
def test_rows_that_draw_stop_by_themselves(samplings: list[Sampling]) -> None:
    prompts = sequences(*LENGTHS)
    ours = session()
    whole = generate(ours, prompts, max_new_tokens=40, sampling=samplings).tokens
    stop = whole[0][7]
    assert stop not in whole[0][:7]
    found = generate(ours, prompts, max_new_tokens=40, sampling=samplings, stop_ids=(stop,))
    ends = [row.index(stop) + 1 if stop in row else 40 for row in whole]
    assert found.tokens == [row[:end] for row, end in zip(whole, ends, strict=True)]
    assert found.stop == ["stop-token" if stop in row else "length" for row in whole]
    assert min(ends) < max(ends)
    assert found.steps == max(ends) - 1
    assert ours.lengths == [len(row) + end - 1 for row, end in zip(prompts, ends, strict=True)]
    theirs = reference()
    theirs.prefill([row + tokens[:-1] for row, tokens in zip(prompts, found.tokens, strict=True)])
    np.testing.assert_allclose(ours.decode([5, 6, 7]), theirs.decode([5, 6, 7]), atol=2e-5)


@pytest.mark.parametrize("samplings", [MIXED, PENALIZED])
def test_draws_do_not_depend_on_how_steps_are_divided(samplings: list[Sampling]) -> None:
    prompts = sequences(*LENGTHS)
    ours, draws = session(), draws_of(samplings, prompts)
    whole = generate(ours, prompts, max_new_tokens=13, sampling=samplings).tokens
    parts = [list[int | None](ours.choose(ours.prefill(prompts), draws))]
    for count in (1, 3, 8):
        parts += list(ours.stream(parts[-1], count, draws))
    assert [list(row) for row in zip(*parts, strict=True)] == whole
    parts = [list(ours.choose(ours.prefill(prompts), draws))]
    for turn in range(12):  # one row at a time
        step: list[int | None] = []
        for row in range(3):
            still = [token if other == row else None for other, token in enumerate(parts[turn])]
            (found,) = ours.stream(still, 1, draws)
            assert [token is None for token in found] == [other != row for other in range(3)]
            step.append(found[row])
        parts.append(step)
    assert [list(row) for row in zip(*parts, strict=True)] == whole


def test_step_by_step_it_chooses_the_same() -> None:
    """As lm-eval's tasks are generated: logits come to the host, the session chooses from them."""
    prompts, ours = sequences(*LENGTHS), session()
    expected = generate(ours, prompts, max_new_tokens=6, sampling=MIXED).tokens
    choose, found = chooser(ours, MIXED, prompts), [list[int]() for _ in prompts]
    logits = ours.prefill(prompts)
    for _ in range(6):
        chosen = choose(logits)
        for row, token in zip(found, chosen, strict=True):
            row.append(token)
        logits = ours.decode(chosen)
    assert found == expected


def test_one_step_serves_all_parameters() -> None:
    """Captured once; extremes of them stay numbers."""
    ours, prompts = session(), sequences(21, 9)
    greedy = generate(ours, prompts, max_new_tokens=9).tokens
    for sampling in (
        Sampling(temperature=1.0),
        Sampling(temperature=3.0, top_k=1),
        Sampling(temperature=1e-40),
        Sampling(temperature=1.0, top_p=1e-30),
        Sampling(temperature=1e300, top_k=1 << 31),
    ):
        found = generate(ours, prompts, max_new_tokens=9, sampling=sampling).tokens
        assert (found == greedy) == (sampling.top_k == 1 or sampling.temperature < 1 or sampling.top_p < 1)
    assert [key[2] for key in ours._steps] == ["greedy", "drawn"]


def test_draws_of_logits_that_are_not_finite() -> None:
    ours = session()
    logits = ours.prefill(sequences(5, 6))
    logits[1, 3] = np.nan
    with pytest.raises(GateError, match="logits that are not finite") as caught:
        ours.choose(logits, [Draw(sampling=Sampling(temperature=1.0))] * 2)
    assert caught.value.where == "row 1"


def test_logits_that_are_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = session()
    logits = ours.prefill(sequences(5))
    monkeypatch.setattr(torch.ops.optc, "greedy_step_", lambda logits, *_, **__: torch.full((len(logits),), -1))
    with pytest.raises(GateError, match="logits that are not finite"):
        next(ours.stream([int(logits.argmax())], 1))


def test_a_call_that_its_kernel_does_not_take_is_refused() -> None:
    """By the session, of prompts and of steps; what else runs the program gets the reference."""
    prompt, (fresh, other, third) = sequences(9), (session(), session(), session())
    expected = other.prefill(prompt)
    third.prefill(prompt)
    kernel = dataclasses.replace(FUSED_LINEAR, accepts=lambda args, kwargs: "rows of odd size")
    library = torch.library.Library("optc", "IMPL")
    try:
        library.impl("fused_linear", functools.partial(call_kernel, kernel), "CPU")
        np.testing.assert_array_equal(open_program(compiled(), num_blocks=16).prefill(prompt), expected)
        for run in (lambda: fresh.prefill(prompt), lambda: list(other.stream([5], 1)), lambda: third.decode([5])):
            with pytest.raises(KernelRefusalError, match="the kernel of optc::fused_linear does not take a") as caught:
                run()
            assert (caught.value.why, caught.value.exit_code) == ("rows of odd size", 4)
            assert str(caught.value.where).startswith("fused_linear_default = torch.ops.optc.fused_linear.default(")
    finally:
        library._destroy()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mixtral", "phi3"])
def test_kernels_take_every_call_of_a_session(family: str) -> None:
    """Prompts, steps, draws and scores, with the arguments that kernels on a GPU would get."""
    ours, prompts, asked = session(family=family), sequences(*LENGTHS), set[str]()

    def ask(kernel: Kernel, *args: object, **kwargs: object) -> object:
        asked.add(kernel.op)
        assert kernel.accepts(args, kwargs) is None
        return kernel.spec.reference(*args, **kwargs)

    library = torch.library.Library("optc", "IMPL")
    try:
        for kernel in kernels_for("cuda"):
            library.impl(kernel.op, functools.partial(ask, kernel), "CPU")
        for samplings in (None, MIXED, PENALIZED):
            generate(ours, prompts, max_new_tokens=4, sampling=samplings)
        ours.decode([1, 2, 3])
        list(ours.score(prompts[0]))
    finally:
        library._destroy()
    assert asked >= {"fused_linear", "greedy_step_", "sample_", "advance_step_"}
    assert asked & {"paged_attention_", "rotary_paged_attention_"}


def test_it_may_be_closed_twice() -> None:
    """By the engine that took it over, and by who opened it."""
    ours = session()
    ours.close()
    ours.close()


def test_memory_is_planned_before_it_is_taken() -> None:
    program = compiled()
    weights = sum(tensor.nbytes for _, tensor in program.weights())
    plan = plan_memory(program, 1 << 30, chunk=128)
    assert (plan.weights, plan.num_blocks) == (weights, 8 * 256 // BLOCK_SIZE)
    assert plan.pool == plan.num_blocks * 2 * 2 * BLOCK_SIZE * 2 * 16 * 4
    assert plan.total < 1 << 30
    with pytest.raises(ResourceError, match=r"it needs 0\.54 GB \(0\.00 GB of weights.*; 0\.50 GB are free") as caught:
        plan_memory(program, 500_000_000, chunk=128)
    assert caught.value.exit_code == 8
    with pytest.raises(ResourceError, match="does not fit the GPU's memory"):
        plan_memory(program, 1 << 30, chunk=128, num_blocks=1 << 20)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="an NVIDIA GPU is needed, and there is none here") as caught:
        cuda.open_artifact(tmp_path, make_manifest(), SessionOptions())
    assert caught.value.exit_code == 4


def test_an_old_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(TargetError, match="the GPU is too old") as caught:
        cuda.check_gpu("artifact")
    assert (caught.value.where, caught.value.why) == ("Tesla T4", "compute capability 7.5; the kernels need 8.0")


def test_a_call_without_a_kernel_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "check_gpu", lambda where: torch.device("cpu"))
    manifest = make_manifest(engine_info={"graph": "graph.json"})
    program = apply(PageKVCache(), stirred("llama")).program  # rotations were not taken in
    apply(FuseRotary(), stirred("llama")).program.save(tmp_path / "rotary")
    with pytest.raises(TargetError, match="have no kernel in this version of optc") as caught:
        cuda.open_artifact(tmp_path / "rotary", manifest, SessionOptions())
    assert "rotary_default: optc.rotary.default: there is none" in str(caught.value.where)
    program.save(tmp_path / "paged")
    monkeypatch.setattr(cuda, "plan_for", lambda program, device, num_blocks: MemoryPlan(0, 0, 0, 4))
    with cuda.open_artifact(tmp_path / "paged", manifest, SessionOptions()) as opened:
        assert opened.prefill([[3, 4]]).shape == (1, 128)


def test_opening_registers_the_kernels() -> None:
    """An artifact is run without a pass or a target having been imported."""
    code = (
        "import torch, optc.runtime.sessions.cuda; from optc.compiler.kernels.kernel import kernels_for; "
        "print(sorted(kernel.op for kernel in kernels_for('cuda')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"fused_linear", "greedy_step_", "rotary_paged_attention_"} <= set(ast.literal_eval(done.stdout))
