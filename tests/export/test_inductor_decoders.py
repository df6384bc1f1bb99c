"""AOTInductor packages of decoders against transformers in eager mode."""

from __future__ import annotations

import json
import subprocess
import sys

import bounds
import numpy as np
import psutil
import pytest
import torch
from once import short_artifact, short_example
from package_driver import drive, model_of, packaged
from stages import sequences

from optc.compiler.execution.stage_driver import run_stage
from optc.runtime.sessions.paged import PagedSession
from optc.runtime.sessions.session import Session
from optc.runtime.sessions.torch_linear import TorchSession

pytestmark = pytest.mark.slow
FLOAT = ("gemma2-static", "gpt2-static", "gemma2-paged")
LENGTHS = (21, 9, 14, 6)


def _expected(name: str, rows: list[list[int]]) -> list[torch.Tensor]:
    model = model_of(name)
    with torch.no_grad():
        return [model(torch.tensor([row])).logits[0] for row in rows]


@pytest.mark.parametrize("name", FLOAT)
def test_package_agrees_with_transformers(name: str) -> None:
    """Ragged prefill, a chunk, single steps; garbage in the caches, blocks in shuffled order."""
    built, rows = packaged(name), sequences(*LENGTHS)
    logits = drive(built.load(), built.program, rows)
    worst = max(float((a - b).abs().max()) for a, b in zip(logits, _expected(name, rows), strict=True))
    assert worst <= 1e-4


@pytest.mark.parametrize("name", FLOAT)
def test_one_token_at_a_time(name: str) -> None:
    """Batch 1 and length 1 from the start, up to the window and past it, in optc's own sessions."""
    built = packaged(name)
    (row,) = sequences(20)
    session: Session
    if built.program.contract.kv_cache.kind == "paged":
        session = PagedSession(built.load(), built.program.contract, num_blocks=4)
    else:
        session = TorchSession(built.load(), built.program.contract)
    (expected,) = _expected(name, [row])
    found = [session.prefill([row[:1]]), *(session.decode([token]) for token in row[1:])]
    assert float(np.abs(np.concatenate(found) - expected.numpy()).max()) <= 1e-4


@pytest.mark.parametrize("name", ["llama-int4", "gpt2-int3"])
def test_quantized_package_equals_its_program(name: str) -> None:
    """bfloat16 with activations rounded to int8, and float32 with activations as they are."""
    built, rows = packaged(name), sequences(*LENGTHS)
    products = built.program.calls(torch.ops.optc.linear_nbits.default)
    assert len(products) == 5  # four of the layer, and the head, whose table is looked up packed
    level = {"llama-int4": {32}, "gpt2-int3": {-1}}[name]
    assert {node.kwargs["activation_group"] for node in products} == level
    assert not [key for key in built.result.tensor_bytes if key.endswith("_codes")]
    found = drive(built.load(), built.program, rows)
    if name == "llama-int4":
        bounds.check(found, *bounds.of_half(built.program, rows))
    else:
        assert bounds.gap(found, run_stage(built.program, rows).logits).largest <= 2e-5


def test_a_step_touches_only_its_slots() -> None:
    """Caches are written in place and read up to the last token: no copy of them, nothing behind it."""
    package = packaged("gpt2-static").load()
    caches = package.caches(batch=1, capacity=1 << 18)  # 64 MiB each, taken when first touched
    for cache in caches:
        cache[:, :, 3:7] = float("nan")
    process = psutil.Process()
    before = process.memory_info().rss
    logits = package(torch.tensor([[5, 6, 7]]), torch.ones((1, 3), dtype=torch.long), *caches)[0]
    assert process.memory_info().rss - before < 16 << 20
    assert bool(logits.isfinite().all())
    assert all(bool(cache[:, :, :3].abs().sum(-1).gt(0).all()) for cache in caches)


def test_full_cache_and_padding_beyond_it() -> None:
    """Capacity = total = sequence, with a right-padded row whose padding does not fit a later call."""
    package, rows = packaged("gpt2-static").load(), sequences(6, 4)
    caches = package.caches(batch=2, capacity=7)
    ids = torch.tensor([rows[0], [*rows[1], 0, 0]])
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    first = package(ids, mask, *caches)[0]
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    second = package(torch.tensor([[9], [9]]), mask, *caches)[0]
    expected = _expected("gpt2-static", [[*rows[0], 9], [*rows[1], 9]])
    torch.testing.assert_close(first[0], expected[0][:6], atol=1e-4, rtol=0)
    torch.testing.assert_close(first[1, :4], expected[1][:4], atol=1e-4, rtol=0)
    torch.testing.assert_close(second[:, 0], torch.stack([row[-1] for row in expected]), atol=1e-4, rtol=0)


_FRESH = """
import runpy, sys
script, sys.argv[1:] = sys.argv[1], sys.argv[2:]
try:
    runpy.run_path(script, run_name="__main__")
except SystemExit as stop:
    assert stop.code == 0, stop.code
loaded = {name.split(".")[0] for name in sys.modules}
assert not loaded & {"optc", "transformers", "torch._inductor.compile_fx"}, loaded
"""


def _fresh(folder: str, *arguments: str) -> dict[str, object]:
    """Run a package's own runner in a process without optc; what it prints."""
    command = [sys.executable, "-I", "-c", _FRESH, f"{folder}/generate.py", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("name", ["gpt2-static", "gemma2-paged"])
def test_fresh_process_without_optc(name: str) -> None:
    built = packaged(name)
    model = model_of(name)
    out = model.generate(torch.tensor([[5, 17, 33]]), max_new_tokens=24, do_sample=False, eos_token_id=None)
    found = _fresh(str(built.folder), "--prompt-tokens", "5,17,33", "--max-new-tokens", "24", "--ignore-eos")
    assert found == {"prompt_tokens": [5, 17, 33], "tokens": out[0, 3:].tolist(), "text": None}


def test_fresh_process_runs_packed_products() -> None:
    """The library registers the operator itself; tokens as greedy decoding of the Program."""
    built = packaged("gpt2-int3")
    tokens = [5, 17, 33]
    for _ in range(12):
        tokens.append(int(run_stage(built.program, [tokens]).logits[0][-1].argmax()))
    found = _fresh(str(built.folder), "--prompt-tokens", "5,17,33", "--max-new-tokens", "12", "--ignore-eos")
    assert found == {"prompt_tokens": [5, 17, 33], "tokens": tokens[3:], "text": None}


def test_fresh_process_generates_text() -> None:
    """A model folder through `optc.compile`, then its own runner: 64 greedy tokens as transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prompt = "The old man looked at the sea, and"
    folder, source = short_artifact("inductor-cpu", kv_cache="static"), short_example()
    ids = AutoTokenizer.from_pretrained(source)(prompt, return_tensors="pt").input_ids
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    expected = model.generate(ids, max_new_tokens=64, do_sample=False)[0, ids.shape[1] :].tolist()
    found = _fresh(str(folder), "--prompt", prompt, "--max-new-tokens", "64")
    assert found["prompt_tokens"] == ids[0].tolist()
    assert found["tokens"] == expected
    assert len(str(found["text"])) > 64
