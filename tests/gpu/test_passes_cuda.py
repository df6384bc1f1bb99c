"""Passes and the stage driver on a GPU: nothing is made on the CPU on the way, and the numbers are the same."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from device_passes import PASSES
from rewrites import stirred

from optc.compiler.calibration.sequences import random_calibration
from optc.compiler.execution.drift import measure
from optc.compiler.execution.stage_driver import run_stage
from optc.compiler.ir.devices import program_device, to_device
from optc.compiler.rewriting.passes import PassContext

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CONTEXT = PassContext(calibration=random_calibration(128, samples=4, length=24, seed=0))
ROWS = ([5, 6, 7, 8, 9, 10, 11, 12, 13], [3, 4, 5, 6, 7])


@pytest.mark.parametrize("name", PASSES)
def test_passes(name: str) -> None:
    here = stirred("llama")
    device = torch.device("cuda", torch.cuda.current_device())
    away = to_device(here, device)
    on_cpu, on_gpu = (dataclasses.replace(CONTEXT, reference=program) for program in (here, away))
    for rewrite in PASSES[name]:
        expected, found = rewrite.run(here, on_cpu), rewrite.run(away, on_gpu)
        assert found.matched == expected.matched
        here, away = expected.program, found.program
    assert [name for name, tensor in away.weights() if tensor.device != device] == []
    assert program_device(away) == device
    run = run_stage(away, ROWS)
    assert run.logits[0].device == device
    back = run_stage(to_device(away, torch.device("cpu")), ROWS)
    assert measure(back, run).max_abs_diff < 2e-3, "the same program, here and there"
