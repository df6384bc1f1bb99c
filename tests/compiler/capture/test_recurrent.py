"""Recurrent layers are captured as the dialect's ops, which are proved against the model's own forward."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from conftest import ROOT

from optc.compiler.capture import capture_model, recurrent
from optc.compiler.diagnostics import GateError
from optc.compiler.ir.program import Program

sys.path.insert(0, str(ROOT / "benchmarks"))
from zoo_models import Kind, build

_SCAN, _CONV, _ATTENTION = (
    getattr(torch.ops.optc, name).default for name in ("linear_attention", "causal_conv1d", "attention")
)


def _model(name: str, architecture: str) -> Any:
    return build(Kind("causal", name, architecture))


def _ops(program: Program) -> tuple[int, ...]:
    return tuple(len(program.calls(op)) for op in (_SCAN, _CONV, _ATTENTION))


@pytest.mark.parametrize(
    ("name", "architecture", "expected"),
    [
        ("mamba", "MambaForCausalLM", (2, 2, 0)),
        ("mamba2", "Mamba2ForCausalLM", (2, 2, 0)),
        ("qwen3_next", "Qwen3NextForCausalLM", (1, 1, 1)),
        ("minimax", "MiniMaxForCausalLM", (1, 0, 1)),  # lightning attention
    ],
)
def test_one_op_per_layer(name: str, architecture: str, expected: tuple[int, ...]) -> None:
    model = _model(name, architecture)
    program = capture_model(model)
    assert program.proof is not None
    assert program.proof.proved
    assert _ops(program) == expected
    ids = torch.randint(3, 100, (1, 17), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found = program.module()(ids, torch.arange(17)[None])
        torch.testing.assert_close(found, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_function_computed_otherwise_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    own = recurrent._FUNCTIONS["mamba2_chunk_scan"]

    def damaged(hidden_states: Any, dt: Any, A: Any, B: Any, C: Any, chunk_size: Any, **named: Any) -> Any:
        return own(hidden_states, dt, A, B, C, chunk_size, **{**named, "D": None})

    monkeypatch.setattr(recurrent, "_same_arguments", lambda *_: True)
    monkeypatch.setitem(recurrent._FUNCTIONS, "mamba2_chunk_scan", damaged)
    with pytest.raises(GateError, match="the program is not what Mamba2ForCausalLM computes"):
        capture_model(_model("mamba2", "Mamba2ForCausalLM"))
