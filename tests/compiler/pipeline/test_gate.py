"""The numerics gate: what it lets through and what it names."""

from __future__ import annotations

import math

import pytest
import torch
from families import make_model

from optc.compiler.capture import capture_model, capture_module
from optc.compiler.diagnostics import GateError
from optc.compiler.execution.stage_driver import StageRun
from optc.compiler.pipeline import gate
from optc.compiler.pipeline.gate import Budget, Drift, Probe


def _check(
    drift: Drift, *, lossy: bool = False, budget: Budget | None = None, dtype: torch.dtype = torch.float32
) -> None:
    gate.check(
        "some-pass",
        drift,
        lossy=lossy,
        budget=budget or Budget(),
        dtype=dtype,
        layer_names=["a.attn", "b.attn"],
    )


def test_measure_by_hand() -> None:
    before = StageRun([torch.tensor([[0.0, 0.0], [2.0, 0.0]])], [[torch.tensor([[3.0], [4.0]])]])
    after = StageRun([torch.tensor([[0.0, math.log(3.0)], [2.0, 0.0]])], [[torch.tensor([[3.0], [4.5]])]])
    drift = gate.measure(before, after, Probe(sequences=((0, 1),)))
    assert drift.max_abs_diff == pytest.approx(math.log(3.0))
    assert drift.scale == 2.0
    # KL((1/2, 1/2) || (1/4, 3/4)) on one of two tokens
    assert drift.kl == pytest.approx(0.5 * (0.5 * math.log(2.0) + 0.5 * math.log(2.0 / 3.0)))
    assert drift.top1 == 0.5
    assert drift.layers == (pytest.approx(0.1),)


def test_perplexity_change_on_text() -> None:
    sure, unsure = torch.tensor([[9.0, 0.0], [0.0, 0.0]]), torch.zeros(2, 2)
    drift = gate.measure(
        StageRun([unsure], []), StageRun([sure], []), Probe(sequences=((0, 0),), is_text=True)
    )
    assert drift.perplexity == pytest.approx((1 + math.exp(-9.0)) / 2 - 1)


@pytest.mark.parametrize(
    ("dtype", "fine", "wrong"),
    [(torch.float32, 2e-4, 4e-4), (torch.bfloat16, 0.5, 0.7), (torch.float16, 0.09, 0.11)],
)
def test_tolerance_follows_dtype_and_scale(dtype: torch.dtype, fine: float, wrong: float) -> None:
    _check(Drift(max_abs_diff=fine, scale=10.0), dtype=dtype)
    with pytest.raises(GateError, match="some-pass"):
        _check(Drift(max_abs_diff=wrong, scale=10.0), dtype=dtype)


def test_worst_layer_is_named() -> None:
    with pytest.raises(GateError) as caught:
        _check(Drift(max_abs_diff=1.0, scale=1.0, layers=(1e-7, 0.5)))
    assert caught.value.where == "layer 1 (b.attn), relative difference 5.00e-01"
    assert caught.value.exit_code == 5


@pytest.mark.parametrize(
    ("drift", "reason"),
    [
        (Drift(max_abs_diff=1.0, scale=1.0, kl=0.3, top1=0.9), "KL 0.3 > 0.2"),
        (Drift(max_abs_diff=1.0, scale=1.0, kl=0.1, top1=0.4), "top-1 agreement 0.400 < 0.500"),
        (Drift(max_abs_diff=1.0, scale=1.0, kl=0.1, top1=0.9, perplexity=0.2), "perplexity"),
        (Drift(max_abs_diff=math.inf, scale=1.0, kl=0.1, top1=0.9), "not finite"),
        (Drift(max_abs_diff=1.0, scale=1.0, kl=math.nan, top1=0.9), "KL nan"),
    ],
)
def test_lossy_budget(drift: Drift, reason: str) -> None:
    with pytest.raises(GateError, match=reason):
        _check(drift, lossy=True, budget=Budget(kl=0.2, top1=0.5, perplexity=0.1))


def test_nan_on_one_side_is_infinite_drift() -> None:
    good, bad = StageRun([torch.ones(1, 2)], []), StageRun([torch.tensor([[1.0, math.nan]])], [])
    assert gate.measure(good, bad, Probe()).max_abs_diff == math.inf
    assert gate.measure(bad, bad, Probe()).max_abs_diff == 0.0


def test_probes_are_ragged_and_long_enough_to_decode() -> None:
    for probe in (gate.random_probe(50), gate.text_probe(list(range(400)))):
        lengths = [len(row) for row in probe.sequences]
        assert len(set(lengths)) == 4
        assert min(lengths) >= 9


def test_run_probe_takes_language_models_and_modules() -> None:
    program = capture_model(make_model("llama"))
    run = gate.run_probe(program, gate.random_probe(128))
    assert [tuple(row.shape) for row in run.logits] == [(40, 128), (10, 128), (20, 128), (13, 128)]
    assert len(run.taps) == 2
    module = capture_module(torch.nn.Linear(3, 5), (torch.ones(2, 3),))
    run = gate.run_probe(module, Probe(tensors=(torch.ones(2, 3),)))
    assert tuple(run.logits[0].shape) == (2, 5)
    assert run.taps == []
