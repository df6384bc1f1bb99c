"""quantize-nf4: the table of the paper, blocks, double quantization, every family."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES
from rewrites import count, difference, rewritten, stirred

from optc.compiler.diagnostics import InputError
from optc.compiler.formats.integer import quantize_groups
from optc.compiler.ir.contract import WeightQuantization
from optc.passes.quantization.nf4 import TABLE, QuantizeNf4, normal_float, quantize_codebook, quantize_scales
from optc.passes.quantization.rtn import QuantizeRtn

CODEBOOK = torch.ops.optc.dequantize_codebook.default
# Appendix E of QLoRA, https://arxiv.org/abs/2305.14314.
PAPER = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
]


def test_the_table_is_the_papers() -> None:
    torch.testing.assert_close(normal_float(), torch.tensor(PAPER), rtol=0, atol=3e-7)


def test_codes_by_hand() -> None:
    """Scales 4 and 1 (zeros): 1.7 / 4 = 0.425 is nearest to 0.4407, code 12; -0.2 / 4 = -0.05 to -0.091 (code 6)."""
    weight = torch.tensor([[-4.0, 1.7, -0.2, 0.1, 0.0, 0.0, 0.0, 0.0]])
    codes, scale = quantize_codebook(weight, normal_float(), 4, "w")
    assert scale.tolist() == [[4.0, 1.0]]
    assert codes.tolist() == [[0, 12, 6, 7, 7, 7, 7, 7]]


def test_codes_are_the_nearest() -> None:
    weight = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))
    codes, scale = quantize_codebook(weight, normal_float(), 64, "w")
    ratio = (weight.reshape(5, 2, 64) / scale[..., None]).reshape(5, 128, 1)
    assert torch.equal(codes.long(), (ratio - normal_float()).abs().argmin(-1))


def test_scales_of_scales() -> None:
    """Two blocks, the second not full: 8 bits around the mean, off by half a step at most."""
    scale = torch.rand(5, 60, generator=torch.Generator().manual_seed(2)) + 3
    codes, step, mean = quantize_scales(scale)
    assert (codes.shape, step.shape, mean.shape) == ((2, 256), (2, 1), ())
    back = (codes.float() - 128) * step + mean
    assert bool(((back.flatten()[:300] - scale.flatten()).abs() <= step.max() / 2 * 1.001).all())
    assert codes[1, 300 - 256 :].unique().tolist() == [128]


@pytest.mark.parametrize(
    ("name", "double"), [("llama", True), *((name, index % 2 == 1) for index, name in enumerate(FAMILIES))]
)
def test_every_family(name: str, double: bool) -> None:
    """The same linears as quantize-rtn takes, and errors of the size of its, on full ranges."""
    program = stirred(name)
    result = rewritten(QuantizeNf4(double_quant=double), program)
    plain = rewritten(QuantizeRtn(bits=4, group_size=64, ranges="full"), program)
    assert (result.matched, result.candidates, result.misses) == (
        plain.matched,
        plain.candidates,
        plain.misses,
    )
    assert count(result.program, CODEBOOK) == plain.matched
    assert {entry.format for entry in result.program.contract.quantization.values()} == {"nf4"}
    if name != "mixtral":  # its routers choose other experts
        assert difference(program, result.program) <= 1.3 * difference(program, plain.program)


def test_normal_weights_come_out_closer_than_from_integers() -> None:
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(3))
    codes, scale = quantize_codebook(weight, normal_float(), 64, "w")
    found = torch.ops.optc.dequantize_codebook(codes, scale, normal_float(), bits=4, group_size=64)
    integers, step, _ = quantize_groups(weight, 4, 64, True)
    plain = torch.ops.optc.dequantize(integers, step, None, bits=4, group_size=64)
    assert (found - weight).square().mean() < 0.85 * (plain - weight).square().mean()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights(dtype: torch.dtype) -> None:
    program = stirred("llama", dtype)
    for double in (False, True):
        result = rewritten(QuantizeNf4(double_quant=double), program)
        assert {node.meta["val"].dtype for node in result.program.calls(CODEBOOK)} == {dtype}
        assert 0 < difference(program, result.program) <= 1.0


def test_double_quantization_changes_little_and_is_smaller() -> None:
    program = stirred("llama")
    once, twice = (rewritten(QuantizeNf4(double_quant=double), program).program for double in (False, True))
    assert 0 < difference(once, twice) <= 0.1 * difference(program, once)
    codes, step, mean = quantize_scales(torch.rand(64, 64))
    assert (codes.numel(), step.numel(), mean.numel()) == (4096, 16, 1)  # 8 bits and 32/256 per scale


def test_contract_and_one_table() -> None:
    program = rewritten(QuantizeNf4(group_size=32), stirred("llama")).program
    source = "model.layers.0.self_attn.q_proj.weight"
    entry = WeightQuantization(method="nf4", bits=4, group_size=32, symmetric=False, source=source, format="nf4")
    assert program.contract.quantization[f"{source}_codes"] == entry
    assert [name for name, _ in program.weights() if TABLE in name] == [TABLE]


def test_a_block_that_does_not_divide() -> None:
    with pytest.raises(InputError, match="group size 48 does not divide every weight"):
        rewritten(QuantizeNf4(group_size=48), stirred("llama"))


def test_a_weight_that_is_not_finite_is_named() -> None:
    with pytest.raises(InputError) as caught:
        quantize_codebook(torch.tensor([[1.0, float("nan")]]), normal_float(), 0, "some.weight")
    assert caught.value.where == "some.weight"
