"""Decoders whose KV cache holds int8 codes, in ONNX Runtime, against the Program with rounded keys and values."""

from __future__ import annotations

import functools
from pathlib import Path

import bounds
import ort_driver
import pytest
import torch
from chosen import chosen
from stages import captured, rewritten, sequences

from optc.compiler.calibration.sequences import random_calibration
from optc.compiler.diagnostics import TargetError
from optc.compiler.execution.stage_driver import run_stage
from optc.compiler.ir.program import Program
from optc.compiler.rewriting.passes import PassContext
from optc.compiler.target.target import check_legal
from optc.passes.kv_cache.codes import StoreKVCodes
from optc.passes.kv_cache.quantize import QuantizeKVCache
from optc.passes.kv_cache.static import StaticKVCache
from optc.runtime.sessions.ort import OrtSession
from optc.targets.onnx_cpu import TARGET

CONTEXT = PassContext(calibration=random_calibration(128, samples=8, length=64, seed=0))
LENGTHS = (21, 9, 14, 5)


@functools.cache
def stages(name: str, granularity: str, format: str = "int8") -> tuple[Program, Program, Program]:
    """(rounded keys and values, caches of codes, legalized); treat them as read-only."""
    layers = 1 if name in ("llama", "gpt2", "phi") else 2  # the others have a window in one layer of two
    program, rounded, codes = captured(name, layers), None, None
    for step in TARGET.recipe("decoder", chosen("onnx-cpu")):
        if isinstance(step.rewrite, StaticKVCache):
            rewrite = QuantizeKVCache(format=format, granularity=granularity)  # type: ignore[arg-type]
            rounded = program = rewrite.run(program, CONTEXT).program
        if not step.applies(program):
            continue
        result = step.rewrite.run(program, CONTEXT)
        program = result.program
        if isinstance(step.rewrite, StoreKVCodes):
            assert result.matched == layers
            codes = program
    assert rounded is not None
    assert codes is not None
    return rounded, codes, program


def test_nothing_is_stored_as_codes_where_nothing_is_rounded() -> None:
    (step,) = (step for step in TARGET.recipe("decoder", chosen("onnx-cpu")) if isinstance(step.rewrite, StoreKVCodes))
    assert not step.applies(rewritten(StaticKVCache(), "llama").program)


@pytest.mark.parametrize(
    ("name", "granularity"),
    [
        *((name, granularity) for name in ("llama", "gpt2") for granularity in ("layer", "head", "channel")),
        ("gemma2", "layer"),
        ("gemma2", "channel"),
        ("phi", "head"),
        ("qwen2-window", "channel"),
    ],
)
def test_engine_and_program_agree(name: str, granularity: str, tmp_path: Path) -> None:
    rounded, _, program = stages(name, granularity)
    check_legal(program, TARGET)
    caches = [spec for spec in program.contract.inputs if spec.role in ("key_cache", "value_cache")]
    assert {spec.dtype for spec in caches} == {"int8"}
    ort_driver.exported(program, tmp_path)
    session, rows = ort_driver.open_session(tmp_path), sequences(*LENGTHS)
    expected, rounding = bounds.of_codes(rounded, rows)
    for way, logits in ort_driver.schedules(session, program.contract, rows).items():
        bounds.check(logits, expected, rounding, way)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_stage_computes_the_same(name: str) -> None:
    rounded, codes, program = stages(name, "head")
    rows = sequences(19, 7, 12)
    expected, rounding = bounds.of_codes(rounded, rows)
    for stage in (codes, program):
        bounds.check(run_stage(stage, rows).logits, expected, rounding)


def test_rotary_stays_in_the_kernel() -> None:
    program = stages("llama", "head")[2]
    calls = program.calls(torch.ops.optc.group_query_attention_codes.default)
    assert [call.args[7] is not None for call in calls] == [True]
    assert not program.calls(torch.ops.optc.quantize.default)


def test_the_session_keeps_int8(tmp_path: Path) -> None:
    rounded, _, program = stages("llama", "channel")
    ort_driver.exported(program, tmp_path)
    session = OrtSession(tmp_path / "model.onnx", program.contract, threads=1)
    row = sequences(9)[0]
    session.prefill([row[:-1]])
    found = torch.from_numpy(session.decode([row[-1]])[0])
    expected, rounding = bounds.of_codes(rounded, [row])
    bounds.check([found[None]], [expected[0][-1:]], rounding)
    assert {cache.dtype.name for cache in session._caches} == {"int8"}


def test_fp8_codes_are_refused() -> None:
    with pytest.raises(TargetError, match="cached_attention_codes"):
        check_legal(stages("llama", "layer", "fp8")[2], TARGET)
