"""The numerics gate: what it lets through and what it names."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from stages import tiny_decoder

from optc.compiler.artifact.manifest import AllowedRecord
from optc.compiler.capture import capture_module
from optc.compiler.diagnostics import GateError
from optc.compiler.execution.drift import Drift
from optc.compiler.ops.packed.inductor_cpu import KEPT
from optc.compiler.pipeline.gate import (
    FLAT,
    PASSES_OWN,
    ROUNDING,
    UNLIMITED,
    Ledger,
    Limits,
    Verdict,
    allowed_total,
    rounds_activations,
    step_misses,
    tolerance_misses,
    total_misses,
)
from optc.compiler.rewriting.budget import Budget, total_budget

BUDGET = Budget(kl=0.01, top1=0.5, perplexity=0.1, relative=0.3, cosine=0.9)
"""A lead counts as decisive above 4 sqrt(0.01) = 0.4."""

SURE, UNSURE = (1.0,) * 10, (0.3,) * 10


def _drift(**values: Any) -> Drift:
    """A drift within `BUDGET`, at its edges; ten tokens are decided, half of them kept."""
    fields = {
        "max_abs_diff": 1.0,
        "scale": 1.0,
        "kl": 0.01,
        "top1": 0.5,
        "entropy": 1.0,
        "classes": 100,
        "kept": SURE[:5],
        "flipped": SURE[:5] + UNSURE,
        "perplexity": 0.1,
        "relative": 9.0,
        "cosine": -1.0,
    }
    return Drift(**{**fields, **values})


def _check(
    drift: Drift,
    *,
    budget: Budget | None = None,
    lossy: bool = False,
    total: Drift | None = None,
    dtype: torch.dtype = torch.float32,
    spent: tuple[Budget, ...] = (),
    limits: Limits = PASSES_OWN,
) -> None:
    ledger = Ledger(budgets=[*spent])
    ledger.note(budget)
    verdict = Verdict("some-pass", drift, total or drift, budget, dtype, lossy)
    verdict.check(ledger, limits, ["a.attn", "b.attn"])


@pytest.mark.parametrize(
    ("dtype", "fine", "wrong"),
    [
        (torch.float32, 2.9e-4, 3.1e-4),
        (torch.bfloat16, 0.59, 0.61),
        (torch.float16, 0.099, 0.101),
        (torch.float64, 0.9e-8, 1.1e-8),
        (torch.int32, 2.9e-4, 3.1e-4),
    ],
)
def test_tolerance_follows_dtype_and_scale(dtype: torch.dtype, fine: float, wrong: float) -> None:
    _check(Drift(max_abs_diff=fine, scale=10.0), dtype=dtype)
    with pytest.raises(GateError, match=r"pass 'some-pass' failed the numerics gate\n.*b.attn|some-pass"):
        _check(Drift(max_abs_diff=wrong, scale=10.0), dtype=dtype)


def test_small_outputs_have_the_tolerance_of_one() -> None:
    assert tolerance_misses(Drift(max_abs_diff=3e-5, scale=0.1), torch.float32) == []
    assert tolerance_misses(Drift(max_abs_diff=3.1e-5, scale=0.1), torch.float32) == [
        "max abs difference 3.1e-05 > 3e-05 (torch.float32)"
    ]


def test_errors_of_exact_passes_add_up_as_squares() -> None:
    fine, wrong = (Drift(max_abs_diff=value, scale=1.0) for value in (5.9e-5, 6.1e-5))
    assert tolerance_misses(fine, torch.float32, passes=4) == []
    assert tolerance_misses(wrong, torch.float32, passes=4) == ["max abs difference 6.1e-05 > 6e-05 (torch.float32)"]
    small = Drift(max_abs_diff=1e-5, scale=1.0)
    Verdict("some-pass", small, fine, None, torch.float32, False).check(Ledger(exact=4), PASSES_OWN, [])
    with pytest.raises(GateError, match="too much is lost since the capture") as caught:
        _check(small, total=Drift(max_abs_diff=3.1e-5, scale=1.0))
    assert caught.value.why == "max abs difference 3.1e-05 > 3e-05 (torch.float32)"
    assert str(caught.value.remedy).startswith(
        "choose more bits, fewer lossy passes, or a wider limit on the sum (--max-kl"
    )


OWN = Drift(max_abs_diff=0.0625, scale=1.0, relative=0.03125)
"""What rounding to 16 bits makes of the stage before; three times as much is within the gate."""


@pytest.mark.parametrize(("passes", "times"), [(1, 3.0), (4, 6.0)])
def test_in_16_bits_rounding_decides_beyond_the_fixed_tolerance(passes: int, times: float) -> None:
    def misses(max_abs_diff: float, relative: float) -> list[str]:
        drift = Drift(max_abs_diff=max_abs_diff, scale=1.0, relative=relative)
        return tolerance_misses(drift, torch.bfloat16, passes, lambda: OWN)

    largest, relative = times * OWN.max_abs_diff, times * OWN.relative
    assert misses(largest, relative) == []
    assert len(misses(largest * 1.01, relative)) == len(misses(largest, relative * 1.01)) == 2
    assert misses(1.0, 0.5) == [
        f"max abs difference 1 > {0.06 * math.sqrt(passes):.3g} (torch.bfloat16)",
        "relative error 0.5, where rounding to torch.bfloat16 makes 0.0312 of the stage before",
    ]


def test_rounding_is_asked_where_it_can_say_something() -> None:
    drift, asked = Drift(max_abs_diff=0.1, scale=1.0), []

    def rounding() -> Drift | None:
        asked.append(1)
        return None

    assert tolerance_misses(drift, torch.float32, rounding=rounding) == [
        "max abs difference 0.1 > 3e-05 (torch.float32)"
    ]
    assert tolerance_misses(Drift(max_abs_diff=0.01, scale=1.0), torch.float16, rounding=rounding) == []
    assert not asked, "float32 rounds little, and a small difference needs no reason"
    expected = ["max abs difference 0.1 > 0.06 (torch.bfloat16)"]
    assert tolerance_misses(drift, torch.bfloat16) == expected
    far = Drift(max_abs_diff=math.inf, scale=1.0, relative=math.inf)
    overflow = tolerance_misses(far, torch.float16, rounding=lambda: far)
    assert overflow == ["max abs difference inf > 0.01 (torch.float16)"], "no rounding explains it"
    assert tolerance_misses(drift, torch.bfloat16, rounding=rounding) == expected
    assert asked == [1]


@pytest.mark.parametrize("step", [True, False])
def test_rounding_decides_for_a_step_and_for_the_sum(step: bool) -> None:
    small, large = Drift(max_abs_diff=0.0, scale=1.0), Drift(max_abs_diff=0.1, scale=1.0)
    verdict = Verdict("some-pass", large if step else small, large, None, torch.bfloat16, False)
    verdict.check(Ledger(exact=1), PASSES_OWN, [], lambda: OWN)
    with pytest.raises(GateError, match=r"max abs difference 0\.1 > 0\.06"):
        verdict.check(Ledger(exact=1), PASSES_OWN, [])


def test_worst_layer_is_named() -> None:
    with pytest.raises(GateError) as caught:
        _check(Drift(max_abs_diff=1.0, scale=1.0, layers=(1e-7, 0.5)))
    assert caught.value.where == "layer 1 (b.attn), relative difference 5.00e-01"
    assert caught.value.remedy == (
        "this pass must not change the numbers: leave it out and report a bug with --dump-ir"
    )
    assert caught.value.exit_code == 5
    with pytest.raises(GateError) as caught:
        _check(Drift(max_abs_diff=1.0, scale=1.0, layers=(0.0, 0.1, 0.2)))
    assert caught.value.where == "layer 2, relative difference 2.00e-01"
    with pytest.raises(GateError) as caught:
        _check(Drift(max_abs_diff=0.0, scale=1.0), total=Drift(max_abs_diff=1.0, scale=1.0, layers=(0.5, 0.1)))
    assert caught.value.where == "layer 0 (a.attn), relative difference 5.00e-01"
    with pytest.raises(GateError) as caught:
        _check(Drift(max_abs_diff=1.0, scale=1.0))
    assert caught.value.where is None


def test_a_budget_is_kept_at_its_edges() -> None:
    assert step_misses(_drift(), BUDGET, PASSES_OWN) == []
    assert total_misses(_drift(), BUDGET, PASSES_OWN) == []
    _check(_drift(), budget=BUDGET, lossy=True)


MISSES = [
    ({"kl": 0.0101}, "KL 0.0101 > 0.01"),
    ({"kl": math.nan}, "KL nan > 0.01"),
    ({"kept": SURE[:5], "flipped": SURE[:6]}, "top-1 agreement 0.455 < 0.500 (11 decided tokens)"),
    ({"perplexity": 0.101}, "perplexity +10.1% > +10.0%"),
    ({"perplexity": math.nan}, "perplexity +nan% > +10.0%"),
    ({"max_abs_diff": math.inf}, "the outputs are not finite"),
]


@pytest.mark.parametrize(("change", "reason"), MISSES)
def test_each_measure_is_held_to_the_budget_and_to_the_sum(change: dict[str, Any], reason: str) -> None:
    assert step_misses(_drift(**change), BUDGET, PASSES_OWN) == [reason]
    assert total_misses(_drift(**change), BUDGET, PASSES_OWN) == [reason]
    with pytest.raises(GateError) as caught:
        _check(_drift(**change), budget=BUDGET, lossy=True)
    assert caught.value.what == "pass 'some-pass' failed the numerics gate"
    assert caught.value.why == reason
    assert "choose more bits" in str(caught.value.remedy)
    with pytest.raises(GateError) as caught:
        _check(_drift(), total=_drift(**change), budget=BUDGET, lossy=True)
    assert caught.value.what == "pass 'some-pass' failed the numerics gate: too much is lost since the capture"
    assert caught.value.why == reason


@pytest.mark.parametrize(
    ("kept", "relative", "cosine", "misses"),
    [
        (SURE[:9] + UNSURE, 0.3, 0.9, []),
        (SURE[:9] + UNSURE, 0.31, 0.9, ["relative error 0.31 > 0.3"]),
        (SURE[:9] + UNSURE, 0.3, 0.89, ["cosine 0.8900 < 0.9000"]),
        (SURE[:9] + UNSURE, math.nan, 0.9, ["relative error nan > 0.3"]),
        (SURE[:9] + UNSURE, 0.3, math.nan, ["cosine nan < 0.9000"]),
        (SURE[:10], 9.0, -1.0, []),
    ],
)
def test_relative_error_stands_in_where_no_token_is_decided(
    kept: tuple[float, ...], relative: float, cosine: float, misses: list[str]
) -> None:
    """Nine of the tokens lead by enough: too few to judge; the tenth makes relative error and cosine idle."""
    drift = _drift(kept=kept, flipped=(), relative=relative, cosine=cosine)
    assert step_misses(drift, BUDGET, PASSES_OWN) == misses
    assert total_misses(drift, BUDGET, PASSES_OWN) == misses


def test_outputs_without_a_distribution_are_held_to_relative_error_and_cosine() -> None:
    fine = Drift(max_abs_diff=1.0, scale=1.0, relative=0.3, cosine=0.9)
    assert step_misses(fine, BUDGET, PASSES_OWN) == []
    wrong = dataclasses.replace(fine, relative=2.0, cosine=-1.0)
    assert step_misses(wrong, BUDGET, PASSES_OWN) == ["relative error 2 > 0.3", "cosine -1.0000 < 0.9000"]


def test_the_user_speaks_of_the_sum() -> None:
    """A limit below the budgets tightens the sum alone; one above them widens the step too."""
    assert step_misses(_drift(), BUDGET, Limits(kl=0.001, top1=0.9, perplexity=0.01, relative=0.1)) == []
    assert total_misses(_drift(), BUDGET, Limits(kl=0.001)) == ["KL 0.01 > 0.001"]
    assert total_misses(_drift(), BUDGET, Limits(perplexity=0.0)) == ["perplexity +10.0% > +0.0%"]
    assert total_misses(_drift(top1=0.6), BUDGET, Limits(top1=0.7)) == ["top-1 agreement 0.600 < 0.700"]
    assert total_misses(_drift(relative=0.2, cosine=1.0), BUDGET, Limits(relative=0.1)) == ["relative error 0.2 > 0.1"]
    wide = _drift(kl=1.0, perplexity=3.0, kept=(), flipped=SURE)
    limits = Limits(kl=1.0, top1=0.0, perplexity=3.0)
    assert step_misses(wide, BUDGET, limits) == []
    assert total_misses(wide, BUDGET, limits) == []
    assert step_misses(wide, BUDGET, Limits(kl=0.9, top1=0.2, perplexity=2.9)) == [
        "KL 1 > 0.9",
        "top-1 agreement 0.000 < 0.200 (10 decided tokens)",
        "perplexity +300.0% > +290.0%",
    ]


@pytest.mark.parametrize(("limit", "cosine", "wrong"), [(0.6, 0.8, 0.79), (1.0, 0.0, -0.1), (1.5, -1.0, math.nan)])
def test_a_wide_limit_on_the_relative_error_widens_the_cosine(limit: float, cosine: float, wrong: float) -> None:
    """Vectors that differ by a share r < 1 of one of them have a cosine of sqrt(1 - r^2) at least."""
    drift = Drift(max_abs_diff=1.0, scale=1.0, relative=limit, cosine=cosine)
    assert step_misses(drift, BUDGET, Limits(relative=limit)) == []
    assert total_misses(drift, BUDGET, Limits(relative=limit)) == []
    drift = dataclasses.replace(drift, cosine=wrong)
    assert step_misses(drift, BUDGET, Limits(relative=limit)) == [f"cosine {wrong:.4f} < {cosine:.4f}"]


def test_a_budget_may_ask_for_more_than_its_relative_error_does() -> None:
    """sqrt(1 - 0.75^2) is 0.66: the budget's own cosine holds as long as its relative error does."""
    budget = dataclasses.replace(BUDGET, relative=0.75, cosine=0.7)
    drift = Drift(max_abs_diff=1.0, scale=1.0, relative=0.75, cosine=0.68)
    assert step_misses(drift, budget, PASSES_OWN) == ["cosine 0.6800 < 0.7000"]
    assert total_misses(drift, budget, Limits(relative=0.7)) == [
        "relative error 0.75 > 0.7",
        "cosine 0.6800 < 0.7000",
    ]


def test_without_limits_only_numbers_that_are_none_are_refused() -> None:
    lost = _drift(kl=1e6, top1=0.0, kept=(), flipped=SURE, perplexity=1e9, relative=1e9)
    assert step_misses(lost, BUDGET, UNLIMITED) == []
    assert total_misses(lost, BUDGET, UNLIMITED) == []
    nan = dataclasses.replace(lost, kl=math.nan, max_abs_diff=math.inf)
    assert total_misses(nan, BUDGET, UNLIMITED) == ["KL nan > inf", "the outputs are not finite"]


def test_small_losses_add_up() -> None:
    """Ten passes, each within its budget, whose losses all point one way."""
    with pytest.raises(GateError, match="since the capture") as caught:
        _check(
            _drift(),
            total=_drift(kl=0.11, kept=UNSURE, flipped=(), relative=0.1, cosine=1.0),
            budget=BUDGET,
            lossy=True,
            spent=(BUDGET,) * 9,
        )
    assert caught.value.why == "KL 0.11 > 0.1"


def test_the_sum_of_budgets() -> None:
    one = Budget(kl=0.1, top1=0.9, perplexity=0.5, relative=0.3, cosine=0.99)
    two = Budget(kl=0.2, top1=0.7, perplexity=0.1, relative=0.4, cosine=0.5)
    assert dataclasses.astuple(total_budget([one, two])) == pytest.approx((0.3, 0.6, 0.65, 0.5, 0.49))
    assert dataclasses.astuple(total_budget([two] * 5)) == pytest.approx(
        (1.0, 0.0, 1.1**5 - 1, 0.8**0.5 * 1.0, -1.0), rel=1e-6
    )
    assert dataclasses.astuple(total_budget([one])) == pytest.approx(dataclasses.astuple(one))


def test_what_is_allowed_in_all_is_the_sum_or_the_users_limit() -> None:
    """As a manifest has it: a limit without end is none, and agreement of decided tokens is no agreement of all."""
    assert allowed_total(None, UNLIMITED) is None
    assert allowed_total(BUDGET, PASSES_OWN) == AllowedRecord(relative_error=0.3, kl=0.01, perplexity_increase=0.1)
    limits = Limits(kl=0.5, top1=0.8, perplexity=math.inf)
    assert allowed_total(BUDGET, limits) == AllowedRecord(relative_error=0.3, kl=0.5, top1_agreement=0.8)


def test_a_pass_that_restores_adds_nothing() -> None:
    ledger = Ledger()
    assert ledger.total is None
    ledger.note(None)
    ledger.note(None)
    ledger.note(BUDGET)
    ledger.note(BUDGET, restores=True)
    assert (ledger.exact, ledger.budgets) == (2, [BUDGET])
    alone = Ledger()  # behind a model that was quantized elsewhere
    alone.note(BUDGET, restores=True)
    assert alone.budgets == [BUDGET]


@pytest.mark.parametrize("field", ["kl", "top1", "perplexity", "relative", "cosine"])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_budget_is_finite(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"a budget must be finite: {field} is {value}"):
        dataclasses.replace(BUDGET, **{field: value})


def test_a_nearly_flat_distribution_is_said() -> None:
    flat = _drift(kl=0.5, entropy=0.91 * math.log(100))
    with pytest.raises(GateError) as caught:
        _check(flat, budget=BUDGET, lossy=True)
    assert caught.value.why == (
        "KL 0.5 > 0.01; the model's own distribution is nearly flat: entropy 4.19 of log(100) = 4.61 nats"
    )
    assert str(caught.value.remedy).startswith("logits of random or untrained weights say nothing about quality: ")
    edge = dataclasses.replace(flat, entropy=FLAT * math.log(100), perplexity=0.2)
    assert edge.flatness == FLAT
    with pytest.raises(GateError) as caught:
        _check(edge, budget=BUDGET, lossy=True)
    assert str(caught.value.why).startswith("KL 0.5 > 0.01; perplexity +20.0% > +10.0%; the model's own distribution")
    with pytest.raises(GateError) as caught:
        _check(dataclasses.replace(flat, entropy=0.89 * math.log(100)), budget=BUDGET, lossy=True)
    assert caught.value.why == "KL 0.5 > 0.01"


def test_rounding_moves_little() -> None:
    """What a pass may move that keeps the numbers of a program which rounds activations."""
    assert dataclasses.astuple(ROUNDING) == (2e-3, 0.95, 5e-3, 0.05, 0.998)


class _Rounds(torch.nn.Module):
    """Rounds its input to codes of 8 bits, token by token."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        codes, scale = torch.ops.optc.quantize_dynamic(x, format="int8")
        return codes * scale


def test_programs_that_round_activations_are_known_by_their_ops() -> None:
    program = tiny_decoder()
    assert program.calls(torch.ops.optc.attention.default)
    assert not rounds_activations(program)
    assert rounds_activations(capture_module(_Rounds(), (torch.ones(2, 4),)))


@pytest.mark.parametrize(("group", "rounds"), [(KEPT, False), (64, True)])
def test_a_packed_product_rounds_activations_when_it_says_so(group: int, rounds: bool) -> None:
    program = tiny_decoder().clone()
    node = program.calls(torch.ops.aten.linear.default)[0]
    node.target, node.kwargs = torch.ops.optc.linear_nbits.default, {"activation_group": group}
    assert rounds_activations(program) is rounds
