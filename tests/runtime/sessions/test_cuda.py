"""Sessions of the CUDA target: all but kernels and captured graphs, on the CPU, by the operators' references."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from artifacts import make_manifest
from rewrites import stirred
from stages import apply, sequences

from optc.compiler.diagnostics import GateError, InputError, ResourceError, TargetError
from optc.compiler.ir.program import Program
from optc.compiler.rewriting.passes import PassContext
from optc.compiler.target.options import CompileOptions
from optc.passes.fusion.rotary import FuseRotary
from optc.passes.kv_cache.paged import PageKVCache
from optc.runtime.generation.generate import generate
from optc.runtime.sessions import cuda
from optc.runtime.sessions.cuda import CudaSession
from optc.runtime.sessions.cuda_memory import MemoryPlan, plan_memory
from optc.runtime.sessions.program import open_program
from optc.runtime.sessions.session import Session, SessionOptions
from optc.targets.inductor_cuda import BLOCK_SIZE, TARGET

LENGTHS = (21, 9, 62)  # the last one fills its block two steps later


@functools.cache
def compiled() -> Program:
    """A tiny Llama after the target's recipe."""
    program = stirred("llama")
    for step in TARGET.recipe("decoder", CompileOptions(dtype="fp32")):
        program = step.rewrite.run(program, PassContext()).program
    return program


def session(num_blocks: int = 16) -> CudaSession:
    return CudaSession(compiled(), MemoryPlan(weights=0, working=0, pool=0, num_blocks=num_blocks))


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
    stream = ours.greedy(first, 30)
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
        next(ours.greedy([5], 1))
    with pytest.raises(ResourceError, match="the KV pool is out of blocks"):
        generate(session(1), [prompt[0][:60]], max_new_tokens=20)


def test_logits_that_are_not_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = session()
    logits = ours.prefill(sequences(5))
    monkeypatch.setattr(torch.ops.optc, "greedy_step_", lambda logits, *_, **__: torch.full((len(logits),), -1))
    with pytest.raises(GateError, match="logits that are not finite"):
        next(ours.greedy([int(logits.argmax())], 1))


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
    program = apply(PageKVCache(), stirred("llama")).program  # rotations were not taken in
    apply(FuseRotary(), stirred("llama")).program.save(tmp_path / "rotary")
    with pytest.raises(TargetError, match="have no kernel in this version of optc") as caught:
        cuda.open_artifact(tmp_path / "rotary", make_manifest(), SessionOptions())
    assert "rotary_default: optc.rotary.default: there is none" in str(caught.value.where)
    program.save(tmp_path / "paged")
    monkeypatch.setattr(cuda, "plan_for", lambda program, device, num_blocks: MemoryPlan(0, 0, 0, 4))
    with cuda.open_artifact(tmp_path / "paged", make_manifest(), SessionOptions()) as opened:
        assert opened.prefill([[3, 4]]).shape == (1, 128)


def test_opening_registers_the_kernels() -> None:
    """An artifact is run without a pass or a target having been imported."""
    code = (
        "import torch, optc.runtime.sessions.cuda; from optc.compiler.kernels.kernel import kernels_for; "
        "print(sorted(kernel.op for kernel in kernels_for('cuda')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"fused_linear", "greedy_step_", "rotary_paged_attention_"} <= set(ast.literal_eval(done.stdout))
