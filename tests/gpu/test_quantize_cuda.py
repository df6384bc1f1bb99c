"""The quantizers on a GPU give what they give on the CPU."""

from __future__ import annotations

import pytest
import torch
from rewrites import stirred

from optc.compiler.calibration.sequences import random_calibration
from optc.compiler.ir.devices import to_device
from optc.compiler.rewriting.passes import Pass, PassContext
from optc.passes.quantization.clip import QuantizeClip
from optc.passes.quantization.gptq import QuantizeGptq
from optc.passes.quantization.nf4 import QuantizeNf4
from optc.passes.quantization.rotate_inputs import RotateInputs
from optc.passes.quantization.scale_awq import ScaleAwq

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CONTEXT = PassContext(calibration=random_calibration(128, samples=4, length=32, seed=0))


@pytest.mark.parametrize(
    "rewrite",
    [
        QuantizeGptq(group_size=32),
        QuantizeClip(group_size=32),
        ScaleAwq(group_size=32),
        RotateInputs(least_gain=0.0),
        QuantizeNf4(),
    ],
)
def test_same_as_on_the_cpu(rewrite: Pass) -> None:
    program = stirred("llama")
    here = rewrite.run(program, CONTEXT).program
    there = rewrite.run(to_device(program, torch.device("cuda")), CONTEXT).program
    back = to_device(there, torch.device("cpu"))
    for name, tensor in here.weights():
        other = back.weight(name)
        if tensor.dtype == torch.uint8:  # sums in another order may round a few codes to the next one
            assert float((tensor != other).double().mean()) < 0.02
        else:
            assert torch.allclose(tensor, other, rtol=1e-3, atol=1e-5)
