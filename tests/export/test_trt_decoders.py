"""Both op sets in ONNX Runtime against their Program: prefill, chunks, single tokens and a ragged batch."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
import trt_driver
from rewrites import stirred
from stages import sequences

from optc.compiler.execution.stage_driver import run_stage
from optc.compiler.ir.program import Program

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
CASES = [
    *(("fp32", name) for name in ("llama", "qwen3", "mistral", "gemma2", "gemma3", "phi", "gpt2")),
    *(("fp16", name) for name in ("llama", "gemma2", "gpt2")),
]


@functools.cache
def compiled(dtype: str, name: str) -> tuple[Program, Program]:
    """In front of the KV cache, and the last stage: the same for both op sets."""
    return trt_driver.stages(stirred(name, DTYPES[dtype]), trt_driver.options(dtype=dtype))


@pytest.mark.parametrize(("dtype", "name"), CASES)
@pytest.mark.parametrize("ops", ["fused", "basic"])
def test_engine_and_program_agree(dtype: str, name: str, ops: str, tmp_path: Path) -> None:
    before, last = compiled(dtype, name)
    trt_driver.export(last, tmp_path, trt_driver.options(trt_ops=ops, dtype=dtype))
    trt_driver.check(before, tmp_path, sequences(*trt_driver.LENGTHS))


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_last_stage_is_executable(name: str) -> None:
    before, last = compiled("fp32", name)
    rows = sequences(*trt_driver.LENGTHS)
    pairs = zip(run_stage(before, rows).logits, run_stage(last, rows).logits, strict=True)
    assert max(float((a - b).abs().max()) for a, b in pairs) <= 1e-5
