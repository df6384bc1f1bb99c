"""W4A8 folders: 4-bit integers and fp8 inputs in compressed-tensors' layout, by its own library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from chosen import chosen
from families import FAMILIES
from hf_folders import config, logits, tensors, write
from stages import apply

from optc.compiler.capture import capture_model, capture_pretrained
from optc.compiler.diagnostics import TargetError
from optc.compiler.ir.program import Program
from optc.passes.quantization.activations import QuantizeActivations
from optc.passes.quantization.rtn import QuantizeRtn
from optc.targets import find_target

IDS = torch.randint(3, 128, (2, 19), generator=torch.Generator().manual_seed(2))
MODULE = "model.layers.0.mlp.down_proj"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> tuple[Program, Path]:
    """A Llama whose linears have 128 columns, and its folder."""
    sizes = {**FAMILIES["llama"][2], "hidden_size": 128, "num_hidden_layers": 1}
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes)).eval()
    folder = tmp_path_factory.mktemp("dense")
    model.save_pretrained(folder)
    return capture_model(model), folder


@pytest.fixture(scope="module")
def program(dense: tuple[Program, Path]) -> Program:
    return apply(QuantizeActivations(format="fp8"), apply(QuantizeRtn(group_size=128), dense[0]).program).program


@pytest.fixture(scope="module")
def folder(program: Program, dense: tuple[Program, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("folder") / "out"
    write(program, dense[1], out)
    return out


def test_the_scheme_is_the_one_that_vllm_names_w4a8(folder: Path) -> None:
    """Its `_is_fp8_w4a8`: 4 bits, symmetric, by group; 8 bits, symmetric, dynamic, by token; packed weights."""
    (group,) = config(folder)["quantization_config"]["config_groups"].values()
    weights, inputs = group["weights"], group["input_activations"]
    assert group["format"] == "pack-quantized"
    assert [weights[key] for key in ("num_bits", "type", "strategy", "group_size", "symmetric", "dynamic")] == [
        4, "int", "group", 128, True, False,
    ]  # fmt: skip
    assert [inputs[key] for key in ("num_bits", "type", "strategy", "symmetric", "dynamic")] == [
        8, "float", "token", True, True,
    ]  # fmt: skip
    parts = {name.removeprefix(f"{MODULE}.") for name in tensors(folder) if name.startswith(f"{MODULE}.")}
    assert parts == {"weight_packed", "weight_scale", "weight_shape"}


def test_a_second_capture_gives_the_programs_logits(
    program: Program, dense: tuple[Program, Path], folder: Path
) -> None:
    again, _ = capture_pretrained(folder)
    assert torch.equal(logits(again, IDS), logits(program, IDS))
    weights_alone = apply(QuantizeRtn(group_size=128), dense[0]).program
    assert float((logits(program, IDS) - logits(weights_alone, IDS)).abs().max()) > 1e-4  # inputs are rounded too


def test_the_library_reads_weights_and_rounds_inputs_alike(program: Program, folder: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="needs compressed-tensors (extra test-oracles)")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    settings: Any = QuantizationConfig.model_validate(config(folder)["quantization_config"])
    scheme = settings.config_groups["group_0"]
    parts = {name.removeprefix(f"{MODULE}."): item for name, item in tensors(folder).items() if MODULE in name}
    found = BaseCompressor.get_value_from_registry("pack-quantized").decompress(parts, scheme)["weight"]
    codes, scale = (program.weight(f"{MODULE}.weight_{part}") for part in ("codes", "scale"))
    expected = torch.ops.optc.dequantize(codes, scale, None, bits=4, group_size=128)
    torch.testing.assert_close(found.float(), expected, rtol=1e-6, atol=0)
    x = torch.randn(1, 6, 128, generator=torch.Generator().manual_seed(3))  # the library wants three axes
    theirs_scale, zero = compute_dynamic_scales_and_zp(x, scheme.input_activations, torch.nn.Module())
    theirs = fake_quantize(x, theirs_scale, zero, scheme.input_activations)
    ours = torch.ops.optc.dequantize_activation(*torch.ops.optc.quantize_dynamic(x, format="fp8"), dtype=torch.float32)
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        (QuantizeRtn(group_size=64), "are symmetric, in groups of 128"),
        (QuantizeRtn(bits=3, group_size=128), "its weight has no fp8 codes"),
        (QuantizeRtn(group_size=128, symmetric=False), "its weight has zero points"),
    ],
)
def test_other_weights_are_refused(
    dense: tuple[Program, Path], tmp_path: Path, weights: QuantizeRtn, reason: str
) -> None:
    result = apply(QuantizeActivations(format="fp8"), apply(weights, dense[0]).program)
    if result.matched:
        with pytest.raises(TargetError, match="cannot hold a weight") as found:
            write(result.program, dense[1], tmp_path / "out")
        assert reason in str(found.value.why)
    else:
        assert reason in result.misses[0].reason


def test_the_target_offers_it_and_the_rotations() -> None:
    def recipe(quant: str, **options: Any) -> list[str]:
        steps = find_target("vllm").recipe("decoder", chosen("vllm", dtype="bf16", quant=quant, **options))
        return [step.rewrite.name for step in steps]

    assert recipe("w4a8") == ["quantize-gptq", "quantize-activations"]
    turns = ["rotate-residual", "rotate-values"]
    assert recipe("rotate+gptq") == [*turns, "quantize-gptq"]
    assert recipe("rotate+smoothquant") == [*turns, "scale-smoothquant", "quantize-gptq", "quantize-activations"]
    assert find_target("vllm").quant["w4a8"].group_sizes == (128,)
    with pytest.raises(TargetError, match="has no place for w4a8 weights"):
        recipe("w4a8", layout="gptq")
    assert not {"int8-static", "nf4", "llm-int8"} & find_target("vllm").quant.keys(), "no layout holds their weights"
    assert recipe("fp8-block", layout="fp8") == recipe("fp8-block") == ["quantize-fp8", "quantize-activations"]
    assert recipe("rtn", layout="awq") == ["quantize-rtn", "round-scales"]
