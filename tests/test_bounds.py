"""The bounds of `bounds`: another order of sums stays within them, a scale that is wrong by 3 % does not."""

from __future__ import annotations

import math
from collections.abc import Callable

import bounds
import pytest
import torch
from families import make_model
from hf_folders import quantized
from rewrites import stir, stirred
from stages import sequences

from optc.compiler.capture import capture_model
from optc.compiler.execution.stage_driver import run_stage
from optc.compiler.ir.program import Program

ROWS = sequences(21, 9, 14, 5)


def damaged(program: Program, name: str, factor: float) -> Program:
    """The program with one weight, or the scale of one, multiplied."""
    made = program.clone()
    table = made.exported.state_dict
    table[name] = torch.nn.Parameter(table[name].detach() * factor, requires_grad=False)
    return made.changed()


def test_gap_by_hand() -> None:
    expected = [torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 0.0]])]
    found = [torch.tensor([[0.0, math.log(3.0)], [2.0, 0.0], [0.0, 2.0], [2.0, 0.1]])]
    made = bounds.gap(found, expected)
    assert made.largest == pytest.approx(math.log(3.0) / 2)
    assert made.rms == pytest.approx(math.sqrt((math.log(3.0) ** 2 + 0.01) / 12))
    assert made.calm == 0.0
    # KL((1/2, 1/2) || (1/4, 3/4)) on one of four tokens, and next to nothing on another
    assert made.kl == pytest.approx(0.125 * math.log(4 / 3), rel=1e-2)
    assert made.other == 0.25
    assert bounds.gap([torch.full((1, 2), math.nan)], [torch.ones(1, 2)]).largest == math.inf


def test_rounding_to_11_bits_is_float16() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(bounds.round_to(x, 11), x.half().float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_of_half(dtype: torch.dtype) -> None:
    """A program in 16 bits is computed in float32 throughout: as the one in float32 with its weights."""
    program = stirred("llama", dtype)
    expected, rounding = bounds.of_half(program, ROWS)
    assert {row.dtype for row in expected} == {torch.float32}
    twin = capture_model(stir(make_model("llama")).to(dtype).float())
    assert bounds.gap(run_stage(twin, ROWS).logits, expected).largest <= 1e-5
    eps = torch.finfo(dtype).eps
    assert 0.2 * eps < rounding.rms < 5 * eps


def _half() -> tuple[Program, str]:
    return stirred("llama", torch.float16), "model.layers.1.mlp.down_proj.weight"


def _codes() -> tuple[Program, str]:
    return quantized("llama", "w8a8"), "model.layers.1.mlp.down_proj.weight_scale"


@pytest.mark.parametrize("kind", [_half, _codes])
def test_another_order_is_within_and_a_wrong_scale_is_not(kind: Callable[[], tuple[Program, str]]) -> None:
    program, name = kind()
    measure = bounds.of_half if kind is _half else bounds.of_codes
    expected, rounding = measure(program, ROWS)
    alone = [run_stage(program, [row]).logits[0] for row in ROWS]  # other shapes of products, other orders of sums
    assert bounds.check(alone, expected, rounding).largest > 0
    wrong = run_stage(damaged(program, name, 1.03), ROWS).logits
    with pytest.raises(AssertionError, match=r"(largest|rms|calm|kl) \d"):
        bounds.check(wrong, expected, rounding)
