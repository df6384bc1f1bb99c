"""Passes as classes: a lossy one says what it may cost, or it cannot be written."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest
from stages import tiny_decoder

from optc.compiler.ir.contract import WeightQuantization
from optc.compiler.rewriting.budget import Budget
from optc.compiler.rewriting.passes import Pass
from optc.passes.quantization.arithmetic.budgets import weight_budget
from optc.passes.quantization.auto import QuantizeAuto
from optc.passes.quantization.tune_scales import TuneScales
from optc.passes.registry import passes


def test_a_lossy_pass_without_a_budget_is_no_class() -> None:
    with pytest.raises(TypeError, match=r"Careless is a lossy pass: it must say in budget\(\) what it may cost"):
        type("Careless", (Pass,), {"name": "careless", "lossy": True})


def test_a_budget_is_for_lossy_passes() -> None:
    with pytest.raises(TypeError, match="Confused has a budget but is not lossy"):
        type("Confused", (Pass,), {"name": "confused", "budget": lambda self, before: None})


def test_an_exact_pass_has_no_budget() -> None:
    with pytest.raises(TypeError, match="pass 'fuse-norm' is not lossy: it has no budget"):
        passes()["fuse-norm"]().budget(tiny_decoder())


def test_budgets_of_all_passes() -> None:
    """The budget of every lossy pass with its default options, so that a wider one is seen."""
    program = tiny_decoder()
    found: dict[str, Budget] = {name: cls().budget(program) for name, cls in passes().items() if cls.lossy}
    assert {name: (row.kl, row.relative) for name, row in found.items()} == {
        "pack-xnnpack": (0.006, 0.1),
        "quantize-activations": (0.006, 0.1),
        "quantize-auto": (0.6, 0.75),
        "quantize-clip": (0.6, 0.75),
        "quantize-fp8": (0.04, 0.25),
        "quantize-gptq": (0.6, 0.75),
        "quantize-head": (0.002, 0.06),
        "quantize-inputs": (0.05, 0.25),
        "quantize-kv-cache": (0.005, 0.1),
        "quantize-llm-int8": (0.011, pytest.approx(0.02**0.5)),
        "quantize-mxfp4": (0.6, 0.75),
        "quantize-nf4": (0.6, 0.75),
        "quantize-nvfp4": (0.6, 0.75),
        "quantize-rtn": (0.6, 0.75),
        "quantize-smooth-activations": (0.006, 0.1),
        "quantize-static": (0.06, 0.25),
        "round-activations": (0.006, 0.1),
        "round-scales": (1e-4, 0.01),
        "tune-scales": (0.005, 0.1),
    }


def test_budgets_of_weights() -> None:
    assert {bits: dataclasses.astuple(weight_budget(bits)) for bits in (8, 4, 3, 2)} == {
        8: (0.005, 0.95, 0.015, 0.1, 0.997),
        4: (0.6, 0.8, 0.7, 0.75, 0.7),
        3: (2.5, 0.5, 4.0, 1.15, 0.35),
        2: (12.0, 0.0, 4000.0, 1.5, -0.05),
    }


@pytest.mark.parametrize(
    ("average_bits", "max_kl", "bits"),
    [
        (4.0, 0.0, 4),
        (3.9, 0.0, 3),
        (6.0, 0.0, 4),
        (8.0, 0.0, 8),
        (2.5, 0.0, 2),
        (8.0, 0.001, 8),
        (8.0, 0.05, 4),
        (8.0, 0.3, 3),
        (3.0, 5.0, 2),
    ],
)
def test_the_budget_of_mixed_bits(average_bits: float, max_kl: float, bits: int) -> None:
    """That of the bits which the average comes to, or of those that three times the asked divergence may come from."""
    found = QuantizeAuto(average_bits=average_bits, max_kl=max_kl).budget(tiny_decoder())
    assert found == weight_budget(bits)


def test_training_scales_costs_what_their_bits_cost() -> None:
    program = tiny_decoder()
    entry = WeightQuantization(method="rtn", bits=3, group_size=32, symmetric=True, source="w")
    more = msgspec.structs.replace(entry, bits=8)
    assert TuneScales().budget(program.with_contract(quantization={"a": more, "b": entry})) == weight_budget(3)
