"""The numerics gate: what it lets through and what it names."""

from __future__ import annotations

import math

import pytest
import torch

from optc.compiler.diagnostics import GateError
from optc.compiler.execution.drift import Drift
from optc.compiler.pipeline import gate
from optc.compiler.pipeline.gate import Budget


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
