"""rotate-inputs: outliers spread over a block of channels, the outputs as before."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES
from rewrites import difference, stirred
from torch import nn

from optc.compiler.analysis.linears import linear_sites
from optc.compiler.calibration.sequences import random_calibration
from optc.compiler.capture import capture_model, capture_module
from optc.compiler.diagnostics import InputError, UsageError
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import set_weight
from optc.compiler.ir.verification import verify_program
from optc.compiler.ops.dialect.rotation import hadamard
from optc.compiler.rewriting.passes import PassContext, PassResult
from optc.compiler.target.options import QuantRequest
from optc.passes.fusion.norm import FuseNorm
from optc.passes.quantization.rotate_inputs import RotateInputs, _rotated, _turn_weight
from optc.targets.methods import choose_quantization, quantization_steps

ROTATE = torch.ops.optc.rotate_blocks.default
CONTEXT = PassContext(calibration=random_calibration(128, samples=2, length=16, seed=0))


def _turned(program: Program, **options: object) -> PassResult:
    result = RotateInputs(**options).run(program, CONTEXT)  # type: ignore[arg-type]
    verify_program(result.program, RotateInputs.name)
    return result


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi", "mixtral"])
def test_every_input_can_be_turned(name: str) -> None:
    """Whatever the dataflow, since nothing has to take the turn but the linear itself."""
    program = FuseNorm().run(stirred(name), PassContext()).program
    result = _turned(program, least_gain=0.0)
    assert result.matched == result.candidates == len(result.program.calls(ROTATE))
    assert difference(program, result.program) < 1e-5


def test_bfloat16_weights_take_the_inverse_of_the_rounded_matrix() -> None:
    """1 / sqrt(128) is no bfloat16 number; an orthonormal inverse would be off by 0.2 % in every product."""
    torch.manual_seed(0)
    linear = nn.Linear(128, 64, bias=False).bfloat16()
    program = capture_module(linear, (torch.randn(1, 128, dtype=torch.bfloat16),))

    matrix, edited = hadamard(128), program.clone()
    _turn_weight(edited, next(iter(linear_sites(edited))), matrix)
    back = _rotated(edited.weight("weight").double(), matrix.bfloat16().double().t())
    gap = back - linear.weight.detach().double()
    assert float(
        (back * linear.weight.detach()).sum() / linear.weight.detach().double().square().sum()
    ) == pytest.approx(1, abs=2e-4)
    assert float(gap.square().mean().sqrt() / linear.weight.detach().double().square().mean().sqrt()) < 4e-3


def _llama(intermediate_size: int) -> Program:
    cls, config_cls, sizes = FAMILIES["llama"]
    config = config_cls(**{**sizes, "intermediate_size": intermediate_size})
    config._attn_implementation = "eager"
    torch.manual_seed(3)
    return capture_model(cls(config).eval().requires_grad_(False))


def _with_outliers() -> Program:
    """A tiny Llama whose products of gate and up have one channel, of 96 in blocks of 32, far above the others."""
    program = FuseNorm().run(_llama(96), PassContext()).program.clone()
    for name, value in list(program.weights()):
        if "up_proj" in name:
            large = value.detach().clone()
            large[5] *= 100.0
            set_weight(program, name, large)
    return program.changed()


def test_only_inputs_that_gain_are_turned() -> None:
    program = _with_outliers()
    result = _turned(program)
    assert (result.matched, result.candidates) == (2, 8)
    turned = result.program.calls(ROTATE)
    assert [tuple(node.args[1].meta["val"].shape) for node in turned] == [(32, 32)] * 2
    assert all("mul" in node.args[0].name for node in turned)
    assert len(result.misses) == 12
    assert all("would reduce its noise by a factor of" in miss.reason for miss in result.misses)
    assert difference(program, result.program) < 1e-4


def test_odd_widths_stay() -> None:
    program = _llama(72)
    result = _turned(program, least_gain=0.0)
    reasons = {miss.reason for miss in result.misses}
    assert reasons == {"no power of two of at least 16 divides its 72 channels"}
    assert result.matched == result.candidates - 2


def test_smoothquant_turns_unless_the_loader_has_its_own_graph() -> None:
    options = choose_quantization(QuantRequest(quant="smoothquant"))
    names = [step.rewrite.name for step in quantization_steps(options)]
    assert names == ["scale-smoothquant", "rotate-inputs", "quantize-gptq", "quantize-activations"]
    assert "rotate-inputs" not in [step.rewrite.name for step in quantization_steps(options, rotations=False)]


@pytest.mark.parametrize("size", [8, 96, 0])
def test_block_sizes(size: int) -> None:
    with pytest.raises(UsageError, match="not a power of two"):
        RotateInputs(block_size=size)


def test_it_needs_tokens() -> None:
    with pytest.raises(InputError, match="needs calibration tokens"):
        RotateInputs().run(stirred("llama"), PassContext())
