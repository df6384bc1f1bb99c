"""quantize-nvfp4: codes, block scales and one scale for the linears of an input."""

from __future__ import annotations

import pytest
import torch
from rewrites import count, difference, rewritten, stirred

from optc.compiler.diagnostics import InputError
from optc.compiler.ir.contract import WeightQuantization
from optc.compiler.ir.surgery import set_weight
from optc.compiler.pipeline.gate import rounds_activations
from optc.compiler.rewriting.passes import PassContext
from optc.passes.quantization.nvfp4 import QuantizeNvfp4

WEIGHT = torch.ops.optc.dequantize_nvfp4.default
LAYER = "model.layers.1"


def test_weights_are_the_nearest_under_the_scales_of_their_input() -> None:
    program = stirred("llama")
    result = rewritten(QuantizeNvfp4(), program)
    made = result.program
    assert (result.matched, result.candidates, count(made, WEIGHT)) == (14, 15, 14)
    names = [f"{LAYER}.self_attn.{part}_proj.weight" for part in "qkv"]
    largest = max(float(program.weight(name).abs().max()) for name in names)
    for name in names:
        scale = made.weight(f"{name}_global_scale")
        assert scale.dtype is torch.float32
        assert float(scale) == pytest.approx(largest / (6 * 448), rel=1e-6)
        weight = program.weight(name)
        codes, blocks = made.weight(f"{name}_codes"), made.weight(f"{name}_scale")
        assert (codes.dtype, tuple(codes.shape)) == (torch.uint8, tuple(weight.shape))
        assert (blocks.dtype, tuple(blocks.shape)) == (torch.float8_e4m3fn, (weight.shape[0], 4))
        back = WEIGHT(codes, blocks, scale, dtype=torch.float32)
        step = (blocks.float() * scale).repeat_interleave(16, 1)
        # Half the widest gap (4 to 6), and what a block scale that was rounded down clips.
        assert bool(((back - weight).abs() <= step + weight.abs() / 16).all())
    down = f"{LAYER}.mlp.down_proj.weight"
    alone = float(program.weight(down).abs().max()) / (6 * 448)
    assert float(made.weight(f"{down}_global_scale")) == pytest.approx(alone, rel=1e-6)
    assert made.contract.quantization[f"{down}_codes"] == WeightQuantization(
        method="nvfp4", bits=4, group_size=16, symmetric=True, source=down, format="nvfp4"
    )
    assert 0 < difference(program, made) < 2.0
    assert not rounds_activations(made)


@pytest.mark.parametrize("name", ["gpt2", "phi3"])
def test_other_families(name: str) -> None:
    result = rewritten(QuantizeNvfp4(), stirred(name))
    assert count(result.program, WEIGHT) == result.matched > 0
    assert difference(stirred(name), result.program) < 3.0


def test_bfloat16_programs_keep_their_type() -> None:
    made = rewritten(QuantizeNvfp4(), stirred("llama", torch.bfloat16)).program
    assert made.weight(f"{LAYER}.mlp.up_proj.weight_global_scale").dtype is torch.float32
    ids = torch.arange(8)[None]
    out = made(ids, ids)
    assert (out[0] if isinstance(out, tuple | list) else out).dtype is torch.bfloat16


def test_what_it_refuses() -> None:
    program = stirred("llama").clone()
    name = f"{LAYER}.mlp.down_proj.weight"
    set_weight(program, name, program.weight(name) * float("nan"))
    with pytest.raises(InputError, match="NaN or infinity") as caught:
        QuantizeNvfp4().run(program, PassContext())
    assert caught.value.where == name
