"""group-experts: a mixture of experts, captured as every expert on every token, becomes one call a layer."""

from __future__ import annotations

import pytest
import torch
from families import make_model
from stages import apply, captured

from optc.compiler.capture import capture_model
from optc.compiler.ir.verification import verify_program
from optc.passes.fusion.group_experts import GroupExperts, has_experts
from optc.passes.quantization.rtn import QuantizeRtn

_FUSED = torch.ops.optc.fused_experts.default


def test_experts_of_a_layer_are_one_call() -> None:
    program = captured("mixtral")
    assert has_experts(program)
    result = apply(GroupExperts(), program)
    layers = len(program.contract.layers)
    assert (result.matched, result.candidates) == (layers, layers)
    verify_program(result.program, "group-experts")
    calls = result.program.calls(_FUSED)
    assert [dict(call.kwargs) for call in calls] == [{"activation": "silu", "gated": True}] * layers
    assert not has_experts(result.program)
    generator = torch.Generator().manual_seed(0)
    for batch, length in ((1, 1), (3, 7)):
        ids = torch.randint(3, 128, (batch, length), generator=generator)
        positions = torch.arange(length).expand(batch, -1)
        expected = program(ids, positions)
        torch.testing.assert_close(
            result.program(ids, positions), expected, atol=1e-5 * float(expected.abs().max()), rtol=0
        )


@pytest.mark.parametrize("kind", ["quantized", "bfloat16", "dense"])
def test_others_are_left_alone(kind: str) -> None:
    if kind == "quantized":
        program = apply(QuantizeRtn(bits=8), captured("mixtral")).program
    else:
        program = (
            capture_model(make_model("mixtral").bfloat16(), prove=False) if kind == "bfloat16" else captured("llama")
        )
    assert apply(GroupExperts(), program).matched == 0
    assert has_experts(program) == (kind == "bfloat16")
