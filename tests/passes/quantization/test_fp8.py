"""quantize-fp8: the numbers of E4M3, scales per channel and per tensor, every family."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES
from rewrites import count, difference, rewritten, stirred

from optc.compiler.diagnostics import InputError
from optc.compiler.ir.contract import WeightQuantization
from optc.passes.quantization.activations import QuantizeActivations
from optc.passes.quantization.fp8 import QuantizeFp8, quantize_float
from optc.passes.quantization.rtn import QuantizeRtn

FLOAT = torch.ops.optc.dequantize_float.default
WEIGHT = torch.tensor([[448.0, -17.0, 0.3], [0.0, 0.0, 0.0], [-44.8, 2.24, 0.0]])


def test_channels_by_hand() -> None:
    """Scales 1, 1 (zeros) and 0.1; 17 ties to 16, 0.3 goes to 0.3125, 22.4 to 22."""
    codes, scale = quantize_float(WEIGHT, "channel", "w")
    torch.testing.assert_close(scale, torch.tensor([[1.0], [1.0], [0.1]]))
    assert codes.float().tolist() == [[448.0, -16.0, 0.3125], [0.0, 0.0, 0.0], [-448.0, 22.0, 0.0]]


def test_the_whole_tensor_by_hand() -> None:
    codes, scale = quantize_float(WEIGHT, "tensor", "w")
    assert scale.tolist() == [[1.0]]
    assert codes.float().tolist() == [[448.0, -16.0, 0.3125], [0.0, 0.0, 0.0], [-44.0, 2.25, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_weight_is_off_by_more_than_a_sixteenth(dtype: torch.dtype) -> None:
    weight = torch.randn(40, 33, generator=torch.Generator().manual_seed(0)).to(dtype) * 0.02
    for granularity in ("channel", "tensor"):
        codes, scale = quantize_float(weight, granularity, "w")  # type: ignore[arg-type]
        assert scale.dtype is dtype
        back = codes.float() * scale.float()
        bound = weight.float().abs() / 16 + scale.float() * 2**-10  # half a step, and of a subnormal
        clipped = weight.float().abs().amax(1, keepdim=True) / 128  # of a scale rounded down
        assert bool(((back - weight.float()).abs() <= bound.maximum(clipped)).all())


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name: str) -> None:
    """The same linears as quantize-rtn takes, stacked and transposed ones too, and small errors."""
    program = stirred(name)
    result = rewritten(QuantizeFp8(), program)
    plain = rewritten(QuantizeRtn(bits=8, group_size=0), program)
    assert (result.matched, result.candidates, result.misses) == (
        plain.matched,
        plain.candidates,
        plain.misses,
    )
    assert count(result.program, FLOAT) == plain.matched
    assert {entry.format for entry in result.program.contract.quantization.values()} == {"fp8"}
    # A router may choose other experts.
    assert difference(program, result.program) <= (2.0 if name == "mixtral" else 0.3)


def test_contract_and_fp8_inputs() -> None:
    program = rewritten(QuantizeFp8(granularity="tensor"), stirred("llama")).program
    source = "model.layers.1.mlp.down_proj.weight"
    entry = WeightQuantization(method="fp8", bits=8, group_size=0, symmetric=True, source=source, format="fp8")
    assert program.contract.quantization[f"{source}_codes"] == entry
    assert program.weight(f"{source}_scale").shape == (1, 1)
    assert program.weight(f"{source}_codes").dtype is torch.float8_e4m3fn
    result = rewritten(QuantizeActivations(format="fp8"), program)
    assert result.matched == 14
    assert {entry.activations for entry in result.program.contract.quantization.values()} == {"fp8"}
    assert 0 < difference(program, result.program) <= 0.3


def test_a_weight_that_is_not_finite_is_named() -> None:
    with pytest.raises(InputError) as caught:
        quantize_float(torch.tensor([[1.0, float("inf")]]), "channel", "some.weight")
    assert caught.value.where == "some.weight"


def test_linears_of_one_input_share_a_scale() -> None:
    program = stirred("llama")
    made = rewritten(QuantizeFp8(granularity="input"), program).program
    names = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"]
    top = max(float(program.weight(name).abs().max()) for name in names)
    for name in names:
        assert made.weight(f"{name}_scale").tolist() == [[pytest.approx(top / 448, rel=1e-6)]]
        back = made.weight(f"{name}_codes").float() * made.weight(f"{name}_scale")
        assert bool(((back - program.weight(name)).abs() <= program.weight(name).abs() / 16 + top * 2**-18).all())
    down = "model.layers.0.mlp.down_proj.weight"
    alone = float(program.weight(down).abs().max()) / 448
    assert made.weight(f"{down}_scale").tolist() == [[pytest.approx(alone, rel=1e-6)]]
