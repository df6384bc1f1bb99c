"""How far a stage in 16 bits is from itself in float32, and that the gate asks where a fixed tolerance does not settle it."""

from __future__ import annotations

import copy
import functools
from dataclasses import replace

import pytest
import torch
from families import make_model
from stages import apply

from optc.compiler.capture import capture_model
from optc.compiler.diagnostics import GateError
from optc.compiler.execution.drift import measure
from optc.compiler.execution.probe import random_probe, run_probe
from optc.compiler.execution.stage_driver import StageRun
from optc.compiler.execution.widened import own_rounding
from optc.compiler.ir.program import Program
from optc.compiler.pipeline import pipeline
from optc.compiler.pipeline.pipeline import Pipeline, PipelineOptions
from optc.compiler.target.target import Step
from optc.passes.kv_cache.paged import PageKVCache
from optc.passes.kv_cache.static import StaticKVCache

PROBE = random_probe(128)


@functools.cache
def programs(dtype: torch.dtype) -> tuple[Program, Program]:
    """A tiny Llama in 16 bits, and the same weights in float32."""
    narrow = make_model("llama").to(dtype)
    return capture_model(narrow), capture_model(copy.deepcopy(narrow).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_widened_is_the_float32_program(dtype: torch.dtype) -> None:
    narrow, wide = programs(dtype)
    run = run_probe(narrow, PROBE)
    expected = measure(run_probe(wide, PROBE), run)
    found = own_rounding(narrow, run, PROBE)
    assert found.relative == pytest.approx(expected.relative, rel=1e-3)
    assert 0 < found.relative < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("rewrite", [PageKVCache(), StaticKVCache(), StaticKVCache(in_place=True)])
def test_stages_with_caches_are_widened_with_them(rewrite: PageKVCache | StaticKVCache) -> None:
    narrow, wide = programs(torch.bfloat16)
    stage = apply(rewrite, narrow).program
    run = run_probe(stage, PROBE)
    expected = measure(run_probe(wide, PROBE), run)
    assert own_rounding(stage, run, PROBE).relative == pytest.approx(expected.relative, rel=1e-3)
    assert stage.contract.inputs[-1].dtype == "bfloat16", "the stage itself stays as it is"


@pytest.mark.parametrize(("share", "passes"), [(1.0, True), (8.0, False)])
def test_beyond_the_fixed_tolerance_rounding_decides(
    monkeypatch: pytest.MonkeyPatch, share: float, passes: bool
) -> None:
    """A difference as large as what rounding makes is let through, one of eight times as much is not."""
    narrow, wide = programs(torch.bfloat16)
    monkeypatch.setattr("optc.compiler.pipeline.gate.TOLERANCE", {torch.bfloat16: 1e-6, torch.float32: 1e-6})
    right, exact = run_probe(narrow, PROBE), run_probe(wide, PROBE)
    error = [share * (found - other) for found, other in zip(exact.logits, right.logits, strict=True)]

    def stage(program: Program, probe: object, **_: object) -> StageRun:
        if program.contract.kv_cache.kind == "none":
            return right
        return replace(right, logits=[row + wrong for row, wrong in zip(right.logits, error, strict=True)])

    monkeypatch.setattr(pipeline, "run_probe", stage)
    asked: list[Program] = []
    measured = pipeline.own_rounding
    monkeypatch.setattr(pipeline, "own_rounding", lambda *args: asked.append(args[0]) or measured(*args))
    run = lambda: Pipeline([Step(PageKVCache())]).run(narrow, PipelineOptions(probe=PROBE))  # noqa: E731
    if passes:
        run()
        assert asked == [narrow], "the step and the sum ask, one forward answers"
        return
    with pytest.raises(
        GateError, match=r"relative error .*, where rounding to torch.bfloat16 makes .* of the stage before"
    ):
        run()
