"""What another order of sums may make of a program that rounds activations follows what the rounding cost."""

from __future__ import annotations

import math

import pytest
import torch
from artifacts import make_manifest
from families import make_model
from msgspec.structs import replace

from optc.compiler.artifact.manifest import DriftRecord, PassRecord
from optc.compiler.capture import capture_model
from optc.compiler.pipeline.gate import ROUNDING
from optc.compiler.pipeline.pipeline import Pipeline, PipelineOptions
from optc.compiler.pipeline.rerounding import REROUNDED, rerounding, rerounding_budget, widened
from optc.passes.quantization.activations import QuantizeActivations
from optc.passes.quantization.rtn import QuantizeRtn


def _record(relative: float | None, rounds: bool = True) -> PassRecord:
    drift = DriftRecord(max_abs_diff=1.0, relative_error=relative)
    return replace(make_manifest().passes[0], drift=drift, rounds_activations=rounds)


def test_another_draw_of_the_rounding_is_allowed() -> None:
    assert math.isclose(REROUNDED, math.sqrt(2), rel_tol=0.1)
    assert rerounding([_record(0.1)]) == pytest.approx(0.15)


def test_costs_of_several_passes_add_as_squares() -> None:
    assert rerounding([_record(0.03), _record(0.5, rounds=False), _record(0.04)]) == pytest.approx(0.075)


def test_what_keeps_the_meaning_may_cost_another_draw_of_the_rounding() -> None:
    """Errors times 1.5, and 2.25 where a measure is a square of them; never less than a fixed budget."""
    drift = DriftRecord(
        max_abs_diff=1.0, relative_error=0.2, cosine=0.98, kl=0.006, top1_agreement=0.92, perplexity_increase=-0.02
    )
    coarse = replace(_record(0.2), drift=drift)
    budget = rerounding_budget([coarse])
    assert (budget.kl, budget.relative) == pytest.approx((0.0135, 0.3))
    assert (budget.top1, budget.perplexity, budget.cosine) == pytest.approx((0.88, 0.03, 0.955))
    assert rerounding_budget([replace(coarse, rounds_activations=False)]) == ROUNDING
    assert rerounding_budget([_record(1e-4)]) == ROUNDING
    both = rerounding_budget([coarse, _record(0.0)])
    assert (both.top1, both.cosine) == (budget.top1, budget.cosine), "a measure that is missing costs nothing"
    worst = rerounding_budget([replace(coarse, drift=replace(drift, cosine=-0.9, kl=0.1))])
    assert (worst.cosine, worst.perplexity) == (-1.0, pytest.approx(0.225)), "no cosine is less, and KL is a loss too"


def test_passes_that_round_nothing_or_were_not_measured_allow_nothing() -> None:
    unmatched = replace(_record(0.1), drift=None)
    assert rerounding([]) == rerounding([_record(0.3, rounds=False), _record(None), unmatched]) == 0.0


def test_only_the_pass_that_rounds_activations_is_recorded_as_such() -> None:
    torch.manual_seed(0)
    program = capture_model(make_model("llama"))
    steps = [QuantizeRtn(bits=8, group_size=0), QuantizeActivations()]
    records = Pipeline(steps).run(program, PipelineOptions()).records
    assert [(record.name, record.rounds_activations) for record in records] == [
        ("quantize-rtn", False),
        ("quantize-activations", True),
    ]
    assert records[1].drift is not None
    assert records[1].drift.relative_error is not None
    assert rerounding(records) == REROUNDED * records[1].drift.relative_error > 0


def test_the_widest_of_what_holds_for_a_program_counts() -> None:
    program = capture_model(make_model("llama"))
    rounding = Pipeline([QuantizeRtn(bits=8, group_size=0), QuantizeActivations()]).run(program, PipelineOptions())
    cases = [(0.1, 0.2, 0.3, 0.4), (0.4, 0.1, 0.2, 0.3), (0.1, 0.4, 0.3, 0.2), (0.1, 0.2, 0.4, 0.3)]
    found = [
        [widened(own, rounded, stage, cost, allowed) for own, rounded, cost, allowed in cases]
        for stage in (program, rounding.program)
    ]
    assert found == [[0.4, 0.4, 0.2, 0.3], [0.4, 0.4, 0.4, 0.4]]
