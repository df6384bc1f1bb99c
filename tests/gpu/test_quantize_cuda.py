"""The quantizers on a GPU give what they give on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_folders import quantized, source, write
from rewrites import stirred

import optc
from optc.compiler.calibration.sequences import random_calibration
from optc.compiler.capture.loading import load_model
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


@pytest.mark.parametrize(
    ("recipe", "layout"),
    [
        ("int4", "compressed-tensors"),
        ("int4-asym", "compressed-tensors"),
        ("int4", "gptq"),
        ("int4", "awq"),
        ("w8a8", "compressed-tensors"),
        ("fp8", "compressed-tensors"),
    ],
)
def test_a_folder_is_the_same_from_the_gpu(recipe: str, layout: str, tmp_path: Path) -> None:
    """Packed, read back and compared there, byte for byte."""
    program = quantized("llama", recipe, half=layout != "compressed-tensors")
    write(program, source("llama"), tmp_path / "here", layout)
    write(to_device(program, torch.device("cuda")), source("llama"), tmp_path / "there", layout)
    names = sorted(file.name for file in (tmp_path / "here").iterdir())
    assert names == sorted(file.name for file in (tmp_path / "there").iterdir())
    for name in names:
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()


@pytest.mark.parametrize("layout", [None, "compressed-tensors", "awq", "gptq"])
def test_a_folder_is_read_straight_to_the_gpu(layout: str | None, tmp_path: Path) -> None:
    folder = source("llama")
    if layout is not None:
        write(quantized("llama", "int4", half=True), folder, tmp_path / "out", layout)
        folder = tmp_path / "out"
    here, _ = load_model(folder, dtype=torch.bfloat16)
    there, _ = load_model(folder, dtype=torch.bfloat16, device=torch.device("cuda"))
    found = there.state_dict()
    for name, tensor in here.state_dict().items():
        assert found[name].device.type == "cuda"
        assert torch.equal(found[name].cpu(), tensor), name


@pytest.mark.parametrize("quant", ["gptq", "smoothquant", "fp8"])
def test_the_command_on_the_gpu(quant: str, tmp_path: Path) -> None:
    """Captured, quantized, gated, written and opened there."""
    rows = torch.randint(0, 128, (4, 32), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {} if quant == "fp8" else {"calibration": rows}
    result = optc.compile(
        source("llama"), target="vllm", quant=quant, device="cuda", output=tmp_path / "out", **options
    )
    opened = result.manifest.opened
    assert opened is not None
    assert opened.opened
    assert opened.relative is not None
    assert quant != "gptq" or opened.relative <= 1e-4
    assert all(len(entry.sha256) == 64 for entry in result.manifest.files)
