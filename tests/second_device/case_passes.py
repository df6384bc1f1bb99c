"""Passes and the stage driver on a second device: nothing is made on the CPU on the way, and the numbers are the same."""

from __future__ import annotations

import numpy as np
import pytest
from device_passes import PASSES
from elsewhere import ELSEWHERE, There, second_device
from rewrites import stirred
from stages import captured

from optc.compiler.calibration.sequences import random_calibration
from optc.compiler.execution.drift import measure
from optc.compiler.execution.stage_driver import run_stage
from optc.compiler.ir.devices import program_device, to_device
from optc.compiler.ir.program import Program
from optc.compiler.rewriting.passes import PassContext
from optc.runtime.sessions.program import RecomputeSession

CONTEXT = PassContext(calibration=random_calibration(128, samples=2, length=24, seed=0))
ROWS = ([5, 6, 7, 8, 9, 10, 11, 12, 13], [3, 4, 5, 6, 7])


def there(program: Program) -> Program:
    moved = to_device(program, ELSEWHERE)
    assert program_device(moved) == ELSEWHERE
    return moved


@pytest.mark.parametrize(("name", "layers"), [("llama", 1), ("gpt2", 1), ("gemma2", 2), ("mixtral", 1), ("bert", 1)])
def test_a_capture_runs(name: str, layers: int) -> None:
    program = captured(name, layers)
    with second_device():
        run = run_stage(there(program), ROWS)
        assert isinstance(run.logits[0], There)
        drift = measure(run_stage(program, ROWS), run)
    assert drift.max_abs_diff == 0.0


TRAINED = ("best",)
"""The second device has no gradients."""
LISTS = ("nvfp4",)
"""Its operator makes tensors of lists, where the second device does not see it."""
UNEVEN = ("smoothquant",)
"""Of a single layer, sums in another order move one code of an activation."""


@pytest.mark.parametrize("name", [name for name in PASSES if name not in (*TRAINED, *LISTS)])
def test_passes(name: str) -> None:
    """The weights stay there, the stage runs there, and both are what the CPU gives."""
    layers = 2 if name in UNEVEN else 1
    here, counts = stirred("llama", layers=layers), []
    for rewrite in PASSES[name]:  # outside: every operator takes longer where a second device is known
        expected = rewrite.run(here, CONTEXT)
        counts.append((expected.matched, expected.candidates))
        here = expected.program
    wanted = run_stage(here, ROWS)
    with second_device():
        away = there(stirred("llama", layers=layers))
        for rewrite, count in zip(PASSES[name], counts, strict=True):
            found = rewrite.run(away, CONTEXT)
            assert (found.matched, found.candidates) == count
            away = found.program
        strangers = [name for name, tensor in away.weights() if tensor.device != ELSEWHERE]
        assert strangers == []
        drift = measure(wanted, run_stage(away, ROWS))
    assert drift.max_abs_diff < 1e-4 * max(1.0, drift.scale)


def test_a_graph_and_the_source_model_run_elsewhere() -> None:
    """Sessions without an engine, and the reference, feed the device and bring the numbers back."""
    program = captured("llama", 1)
    tokens = [5, 6, 7, 8, 9]
    expected = np.concatenate(list(RecomputeSession(program).score(tokens)))
    with second_device():
        found = np.concatenate(list(RecomputeSession(to_device(program, ELSEWHERE)).score(tokens)))
    assert np.abs(found - expected).max() < 1e-5
