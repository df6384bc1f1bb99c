"""quantize-activations: which linears, shared codes, the numbers of W8A8, and reasons."""

from __future__ import annotations

import functools

import bounds
import pytest
import torch
from rewrites import count, difference, rewritten, stirred
from stages import sequences
from torch import Tensor

from optc.compiler.analysis.linears import linear_sites
from optc.compiler.capture import capture_module
from optc.compiler.execution.stage_driver import run_stage
from optc.compiler.ir.program import Program
from optc.compiler.rewriting.passes import PassResult
from optc.passes.quantization.activations import QuantizeActivations
from optc.passes.quantization.rtn import QuantizeRtn

_optc = torch.ops.optc
DYNAMIC = _optc.quantize_dynamic.default


@functools.cache
def w8a8(name: str) -> tuple[Program, PassResult]:
    """(a family with 8-bit weights, the result of the pass on it); treat them as read-only."""
    weights = rewritten(QuantizeRtn(bits=8, group_size=0), stirred(name)).program
    return weights, rewritten(QuantizeActivations(), weights)


# Distinct inputs of quantized linears in two layers: attention, its output, MLP, its output; experts have one
# input each of their down projections; phi's and gpt-neox's attention and MLP read norms of their own or one.
INPUTS = {"mixtral": 2 * (2 + 1 + 4), "phi": 2 * 3, "bert": 2 * 4 + 1}


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi", "phi3", "gpt-neox", "opt", "gemma2", "mixtral", "bert"])
def test_linears_of_one_input_share_its_codes(name: str) -> None:
    weights, result = w8a8(name)
    assert result.matched == len(weights.contract.quantization)
    assert count(result.program, DYNAMIC) == INPUTS.get(name, 8)
    quantized = [site for site in linear_sites(result.program) if site.placeholder is None]
    assert {site.activations for site in quantized} == {"int8"}
    assert {entry.activations for entry in result.program.contract.quantization.values()} == {"int8"}
    assert {entry.activations for entry in weights.contract.quantization.values()} == {""}
    # Rounding changes the choice of experts, which is no small error on random weights.
    assert difference(weights, result.program) <= (0.5 if name == "mixtral" else 0.1)


def test_every_token_has_its_scale() -> None:
    """What a row computes depends on no other row."""
    _, result = w8a8("llama")
    rows = sequences(7, 7, 7)
    whole, rounding = bounds.of_codes(result.program, rows)
    alone = [run_stage(result.program, [row]).logits[0] for row in rows]
    bounds.check(alone, whole, rounding)


class _Linear(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(2, 1, bias=False)
        self.linear.weight.data = torch.tensor([[127.0, 50.4]])

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def test_the_product_by_hand() -> None:
    """Weights 127 and 50 (scale 1), inputs 254 and -3 with scale 2: codes 127 and -2, (127*127 - 50*2) * 2."""
    program = capture_module(_Linear(), (torch.rand(2, 2),), dynamic={"input_0": {0: "batch"}})
    program = rewritten(QuantizeRtn(bits=8, group_size=0, head=True), program).program
    program = rewritten(QuantizeActivations(), program).program
    out = program(torch.tensor([[254.0, -3.0]]))
    assert out.tolist() == [[(127 * 127 - 50 * 2) * 2.0]]


@pytest.mark.parametrize(
    ("weights", "format", "reason"),
    [
        (QuantizeRtn(bits=4, group_size=0), "int8", "its weight has no 8-bit integer codes"),
        (
            QuantizeRtn(bits=8, group_size=32),
            "int8",
            "its weight has several scales per channel: use group size 0",
        ),
        (
            QuantizeRtn(bits=8, group_size=0, symmetric=False),
            "int8",
            "its weight has zero points: use symmetric codes",
        ),
        (QuantizeRtn(bits=8, group_size=0), "fp8", "its weight has no fp8 codes: see quantize-fp8"),
    ],
)
def test_other_weights_are_misses(weights: QuantizeRtn, format: str, reason: str) -> None:
    program = rewritten(weights, stirred("llama")).program
    result = rewritten(QuantizeActivations(format=format), program)  # type: ignore[arg-type]
    assert (result.matched, {miss.reason for miss in result.misses}) == (0, {reason})


def test_twice_is_refused_and_no_weights_are_no_match() -> None:
    again = rewritten(QuantizeActivations(), w8a8("llama")[1].program)
    assert (again.matched, {miss.reason for miss in again.misses}) == (0, {"its input is already quantized"})
    none = rewritten(QuantizeActivations(), stirred("llama"))
    assert (none.matched, none.misses) == (0, ())
