"""quantize-smooth-activations: which inputs are rounded, what is said of the others, and the folder that holds both."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from hf_folders import config, logits, tensors, write
from rewrites import rewritten, stirred
from torch import Tensor, nn

from optc.compiler.calibration.examples import Examples
from optc.compiler.calibration.sequences import Calibration, random_calibration
from optc.compiler.capture import capture_model, capture_module, capture_pretrained
from optc.compiler.diagnostics import InputError, UsageError
from optc.compiler.ir.program import Program
from optc.compiler.rewriting.passes import PassContext, PassResult
from optc.compiler.target.options import QuantRequest
from optc.passes.quantization.rtn import QuantizeRtn
from optc.passes.quantization.smooth_activations import QuantizeSmoothActivations
from optc.targets.methods import choose_quantization, quantization_steps

CONTEXT = PassContext(calibration=random_calibration(128, samples=2, length=16, seed=0))
ROWS = QuantizeRtn(bits=8, group_size=0, head=True)
IDS = torch.randint(3, 128, (2, 19), generator=torch.Generator().manual_seed(2))
SMALL = 100
"""Entries of a token that are lost to the scale of its one large entry."""


class _Two(nn.Module):
    """Two linears; the second reads the inputs without their first entry."""

    def __init__(self) -> None:
        super().__init__()
        self.peaked = nn.Linear(SMALL + 1, 4, bias=False)
        self.smooth = nn.Linear(SMALL, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.peaked(x) + self.smooth(x[:, 1:])


def _by_hand(largest_error: float) -> PassResult:
    """A token of 127 and a hundred times 0.49: its scale is 1, and each small entry becomes 0."""
    x = torch.full((1, SMALL + 1), 0.49)
    x[0, 0] = 127.0
    torch.manual_seed(0)
    program = rewritten(ROWS, capture_module(_Two(), (x,))).program
    context = PassContext(calibration=Calibration(Examples(((x,),)), "by hand"))
    return QuantizeSmoothActivations(largest_error=largest_error).run(program, context)


def test_the_error_by_hand() -> None:
    small = SMALL * 0.49**2
    error = math.sqrt(small / (127.0**2 + small))
    assert error == pytest.approx(0.0386, abs=1e-4)
    result = _by_hand(0.038)
    assert (result.matched, result.candidates) == (1, 2)
    assert [miss.reason for miss in result.misses] == [
        "rounding its input to 8 bits would change it by 3.9%, above 3.8%"
    ]
    table = result.program.contract.quantization
    assert {name: entry.activations for name, entry in table.items()} == {
        "peaked.weight_codes": "",
        "smooth.weight_codes": "int8",
    }
    assert _by_hand(0.039).matched == 2


def _llama() -> tuple[Program, nn.Module]:
    """A tiny Llama, one channel of whose products of gate and up is far above the others."""
    cls, config_cls, sizes = FAMILIES["llama"]
    torch.manual_seed(3)
    model = cls(config_cls(**{**sizes, "intermediate_size": 256})).eval().requires_grad_(False)
    for name, value in model.named_parameters():
        if "up_proj" in name:
            value[5] *= 100.0
    return capture_model(model), model


def test_a_folder_holds_linears_of_both_kinds(tmp_path: Path) -> None:
    """And a second capture computes what the program does."""
    captured, model = _llama()
    model.save_pretrained(tmp_path / "dense")
    weights = rewritten(QuantizeRtn(bits=8, group_size=0), captured).program
    result = QuantizeSmoothActivations().run(weights, CONTEXT)
    assert len(result.misses) == 2
    assert all("change it by" in miss.reason for miss in result.misses)
    write(result.program, tmp_path / "dense", tmp_path / "out")
    settings = config(tmp_path / "out")["quantization_config"]
    assert settings["format"] == "mixed-precision"
    groups = {group["format"]: group["targets"] for group in settings["config_groups"].values()}
    downs = [f"model.layers.{layer}.mlp.down_proj" for layer in range(2)]
    assert groups["pack-quantized"] == downs
    assert len(groups["int-quantized"]) == 2 * 6
    assert {name for name in tensors(tmp_path / "out") if name.startswith(downs[0])} == {
        f"{downs[0]}.weight_{part}" for part in ("packed", "scale", "shape")
    }
    again, _ = capture_pretrained(tmp_path / "out")
    assert torch.equal(logits(again, IDS), logits(result.program, IDS))


def test_the_method() -> None:
    options = choose_quantization(QuantRequest(quant="smoothquant-mixed"))
    names = [step.rewrite.name for step in quantization_steps(options, rotations=False)]
    assert names == ["scale-smoothquant", "quantize-gptq", "quantize-smooth-activations"]


@pytest.mark.parametrize("error", [0.0, -1.0, 1.5, math.nan])
def test_a_largest_error_is_a_share(error: float) -> None:
    with pytest.raises(UsageError, match="not a share of the inputs' size"):
        QuantizeSmoothActivations(largest_error=error)


def test_it_needs_tokens() -> None:
    with pytest.raises(InputError, match="needs calibration tokens"):
        QuantizeSmoothActivations().run(
            rewritten(QuantizeRtn(bits=8, group_size=0), stirred("llama")).program, PassContext()
        )


def test_weights_of_other_forms_are_misses() -> None:
    program = rewritten(QuantizeRtn(bits=4, group_size=32), stirred("llama")).program
    result = QuantizeSmoothActivations().run(program, CONTEXT)
    assert (result.matched, {miss.reason for miss in result.misses}) == (0, {"its weight has no 8-bit integer codes"})


def test_twice_changes_nothing() -> None:
    """Inputs that are rounded already stay so."""
    once = QuantizeSmoothActivations().run(
        rewritten(QuantizeRtn(bits=8, group_size=0), stirred("llama")).program, CONTEXT
    )
    again = QuantizeSmoothActivations().run(once.program, CONTEXT)
    assert again.matched == 0
    assert "its input is already quantized" in {miss.reason for miss in again.misses}
