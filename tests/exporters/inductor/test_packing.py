"""Weights are packed for MKL unless a graph of one row is faster without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

from optc.compiler.capture import capture_module
from optc.compiler.ir.program import Program
from optc.exporters.inductor import packing
from optc.exporters.inductor.in_process import compile_here


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def _program(module: nn.Module, *shape: int) -> Program:
    return capture_module(module.eval(), (torch.randn(*shape),), input_names=["x"])


def test_what_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linears of one row; nothing where there are others, another type, a convolution, or none."""
    timed: list[Any] = []

    def slower(shapes: object) -> bool:
        timed.append(shapes)
        return False

    monkeypatch.setattr(packing, "_is_faster_packed", slower)
    assert not packing.packing_pays(_program(_Net(), 1, 1, 32))
    (shapes,) = timed
    assert {shape: len(weights) for shape, weights in shapes.items()} == {(64, 32): 1, (32, 64): 1}
    others = (
        _program(_Net(), 2, 32),
        _program(nn.Sequential(nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3)), 1, 1, 6),
        _program(nn.ReLU(), 1, 4),
        capture_module(_Net().bfloat16().eval(), (torch.randn(1, 32).bfloat16(),), input_names=["x"]),
    )
    assert all(packing.packing_pays(program) for program in others)
    assert len(timed) == 1


@pytest.mark.parametrize(("packed", "pays"), [(0.5, True), (2.0, False)])
def test_the_faster_one_is_taken(packed: float, pays: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both really run; a weight of which there are many counts as often."""
    if not torch._C.has_mkl:
        pytest.skip("this torch has no MKL")
    own, shares = packing._fastest, []

    def fastest(*calls: object) -> list[float]:
        found = own(*calls)  # type: ignore[arg-type]
        assert all(0 < seconds < 60 for seconds in found)
        shares.append(found)
        return [1.0, packed]

    monkeypatch.setattr(packing, "_fastest", fastest)
    assert packing.packing_pays(_program(_Net(), 1, 32)) == pays
    assert len(shares) == 2


def test_a_graph_whose_weights_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "_is_faster_packed", lambda shapes: False)
    module, x = _Net(), torch.randn(1, 32)
    program = _program(module, 1, 32)
    with torch.inference_mode():
        found, codes = run_and_get_code(lambda: compile_here(program, [x], tolerance=1e-5)(x))
        torch.testing.assert_close(found[0], module(x), atol=1e-5, rtol=0)
    assert codes
    assert not any("mkl_linear" in code for code in codes)
