"""quantize-inputs: one calibrated scale per input, shared by the linears that read it."""

from __future__ import annotations

import pytest
import torch
from modelopt_folders import CONTEXT
from rewrites import count, difference, rewritten, stirred

from optc.compiler.diagnostics import InputError
from optc.compiler.ir.program import Program
from optc.compiler.pipeline.gate import rounds_activations
from optc.compiler.rewriting.passes import PassContext
from optc.passes.quantization.fp8 import QuantizeFp8
from optc.passes.quantization.inputs import QuantizeInputs
from optc.passes.quantization.nvfp4 import QuantizeNvfp4
from optc.passes.quantization.rtn import QuantizeRtn

_optc = torch.ops.optc
WEIGHTS = {
    "fp8": QuantizeFp8(granularity="input"),
    "int8": QuantizeRtn(bits=8, group_size=0),
    "nvfp4": QuantizeNvfp4(),
}
TOP = {"fp8": 448.0, "int8": 127.0, "nvfp4": 6 * 448.0}


def inputs_of(program: Program) -> list[float]:
    """The largest magnitude of every linear's input on the calibration tokens, by an interpreter of its own."""
    seen: list[float] = []

    class Record(torch.fx.Interpreter):
        def call_function(self, target, args, kwargs):  # type: ignore[no-untyped-def]
            if target is torch.ops.aten.linear.default:
                seen.append(float(args[0].abs().max()))
            return super().call_function(target, args, kwargs)

    assert CONTEXT.calibration is not None
    tokens = CONTEXT.calibration.tokens
    Record(program.module()).run(tokens, torch.arange(tokens.shape[1]).expand_as(tokens))
    return seen


@pytest.mark.parametrize("format", WEIGHTS)
def test_scales_are_the_largest_magnitudes(format: str) -> None:
    program = rewritten(WEIGHTS[format], stirred("llama")).program
    result = QuantizeInputs(format=format).run(program, CONTEXT)  # type: ignore[arg-type]
    made = result.program
    made.exported.validate()
    assert (result.matched, result.candidates) == (14, 14)
    scales = {name: tensor for name, tensor in made.weights() if name.endswith("_input_scale")}
    assert len(scales) == 8  # q k v, o, gate up, down in 2 layers
    expected = sorted(set(inputs_of(program)[:-1]))  # without the head's
    for scale, largest in zip(sorted(float(item) for item in scales.values()), expected, strict=True):
        assert scale == pytest.approx(largest / TOP[format], rel=1e-6)
    assert all(item.dtype is torch.float32 and tuple(item.shape) == (1,) for item in scales.values())
    assert count(made, _optc.quantize_nvfp4.default if format == "nvfp4" else _optc.quantize.default) == 8
    assert {entry.activations for entry in made.contract.quantization.values()} == {format}
    assert rounds_activations(made)
    assert 0 < difference(program, made) < (3.0 if format == "nvfp4" else 0.5)
    again = QuantizeInputs(format=format).run(made, CONTEXT)  # type: ignore[arg-type]
    assert again.matched == 0
    assert again.misses[0].reason == "its input is already quantized"


def test_linears_whose_weights_do_not_fit_are_misses() -> None:
    program = rewritten(QuantizeRtn(bits=3, group_size=32), stirred("llama")).program
    for format, reason in (
        ("fp8", "its weight has no fp8 codes: see quantize-fp8"),
        ("nvfp4", "its weight has no nvfp4 codes: see quantize-nvfp4"),
        ("int8", "its weight has no 8-bit integer codes"),
    ):
        result = QuantizeInputs(format=format).run(program, CONTEXT)  # type: ignore[arg-type]
        assert (result.matched, result.misses[0].reason) == (0, reason)


def test_without_calibration_it_says_so() -> None:
    program = rewritten(WEIGHTS["fp8"], stirred("llama")).program
    with pytest.raises(InputError, match="pass 'quantize-inputs' needs calibration tokens"):
        QuantizeInputs().run(program, PassContext())
