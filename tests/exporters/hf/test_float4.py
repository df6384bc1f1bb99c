"""NVFP4 folders in compressed-tensors' layout, and scales of keys and values: for vLLM, by readers of others."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from chosen import chosen
from hf_folders import config, logits, source, tensors, write
from modelopt_folders import made, rewritten
from modelopt_folders import write as write_modelopt
from stages import captured

from optc.compiler.capture import capture_pretrained
from optc.compiler.diagnostics import InputError, TargetError
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import set_weight
from optc.compiler.ops.dialect.mxfp4 import quantize_mxfp4
from optc.passes.kv_cache.quantize import QuantizeKVCache
from optc.passes.quantization.inputs import QuantizeInputs
from optc.passes.quantization.mxfp4 import QuantizeMxfp4
from optc.passes.quantization.nvfp4 import QuantizeNvfp4
from optc.targets import find_target

IDS = torch.randint(0, 128, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def program() -> Program:
    return rewritten(captured("llama"), (QuantizeNvfp4(), QuantizeInputs(format="nvfp4")))


@pytest.fixture(scope="module")
def folder(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("folder") / "out"
    write(program, source("llama"), out)
    return out


def test_a_second_capture_gives_the_programs_logits(program: Program, folder: Path) -> None:
    again, _ = capture_pretrained(folder)
    ours = logits(program, IDS)
    assert torch.equal(logits(again, IDS), ours)
    assert float((ours - logits(captured("llama"), IDS)).abs().max()) > 0.01  # something was rounded


def test_the_library_reads_the_weights(program: Program, folder: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="needs compressed-tensors (extra test-oracles)")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    settings = QuantizationConfig.model_validate(config(folder)["quantization_config"])
    assert settings.format == "nvfp4-pack-quantized"
    scheme: Any = settings.config_groups["group_0"]
    module = "model.layers.1.mlp.down_proj"
    state = {
        name.removeprefix(f"{module}."): item for name, item in tensors(folder).items() if name.startswith(f"{module}.")
    }
    assert state.keys() == {"weight_packed", "weight_scale", "weight_global_scale", "input_global_scale"}
    found = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized").decompress(state, scheme)["weight"]
    parts = [program.weight(f"{module}.weight_{part}") for part in ("codes", "scale", "global_scale")]
    expected = torch.ops.optc.dequantize_nvfp4(*parts, dtype=torch.float32)
    torch.testing.assert_close(found.float(), expected, rtol=2**-7, atol=0)  # the library divides in bfloat16


def test_transformers_makes_the_programs_weights(folder: Path) -> None:
    """It dequantizes in bfloat16, and leaves inputs as they are."""
    pytest.importorskip("compressed_tensors", reason="needs compressed-tensors (extra test-oracles)")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    settings = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=settings).eval()
    with torch.no_grad():
        theirs, plain = model(IDS).logits, logits(captured("llama"), IDS)
    ours = logits(rewritten(captured("llama"), (QuantizeNvfp4(),)), IDS)
    assert float((theirs - ours).norm()) < 0.03 * float((ours - plain).norm())


def test_the_library_rounds_inputs_as_the_program(folder: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="needs compressed-tensors (extra test-oracles)")
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    settings: Any = QuantizationConfig.model_validate(config(folder)["quantization_config"])
    args = settings.config_groups["group_0"].input_activations
    over = tensors(folder)["model.layers.0.self_attn.q_proj.input_global_scale"]
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(3))
    scale, zero = compute_dynamic_scales_and_zp(x, args, torch.nn.Module(), global_scale=over)
    theirs = fake_quantize(x, scale, zero, args, global_scale=over)
    ours = torch.ops.optc.dequantize_nvfp4(*torch.ops.optc.quantize_nvfp4(x, 1 / over), 1 / over, dtype=torch.float32)
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-6)


def test_a_folder_of_modelopt_goes_on(tmp_path: Path, folder: Path) -> None:
    """The same codes, and scales whose reciprocals are written; those of other makers may have none."""
    write_modelopt(made("llama", "NVFP4"), source("llama"), tmp_path / "a")
    again, _ = capture_pretrained(tmp_path / "a")
    write(again, tmp_path / "a", tmp_path / "b")
    one, other = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    name = "model.layers.0.self_attn.q_proj"
    assert torch.equal(other[f"{name}.weight_packed"], one[f"{name}.weight"])
    assert float(other[f"{name}.weight_global_scale"] * one[f"{name}.weight_scale_2"]) == pytest.approx(1, rel=1e-6)
    none = next(s for s in torch.linspace(1.5, 1.6, 1000) if 1 / (1 / s) != s)
    set_weight(again, f"{name}.weight_global_scale", none.reshape(1))
    with pytest.raises(TargetError, match="cannot hold a weight") as found:
        write(again, tmp_path / "a", tmp_path / "c")
    assert "is not the reciprocal of a float32 number" in str(found.value.why)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda group: group["weights"].update(group_size=32), "'group_size' is 32"),
        (lambda group: group["input_activations"].update(dynamic=True), "'dynamic'"),
        (lambda group: group["weights"].update(strategy="group"), "'strategy' is 'group'"),
    ],
)
def test_other_schemes_are_refused(folder: Path, tmp_path: Path, change: Any, message: str) -> None:
    shutil.copytree(folder, tmp_path / "out")
    settings = config(folder)
    change(settings["quantization_config"]["config_groups"]["group_0"])
    (tmp_path / "out" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError) as found:
        capture_pretrained(tmp_path / "out")
    assert message in str(found.value)


def test_the_passes_of_the_target() -> None:
    def recipe(**options: Any) -> list[str]:
        return [
            step.rewrite.name for step in find_target("vllm").recipe("decoder", chosen("vllm", dtype="bf16", **options))
        ]

    assert find_target("vllm").quant["nvfp4"].group_sizes == (16,)
    assert recipe(quant="nvfp4") == ["quantize-nvfp4", "quantize-inputs"]
    assert recipe(quant="mxfp4") == ["quantize-mxfp4"]
    assert recipe(kv_cache_dtype="fp8") == ["quantize-kv-cache"]
    with pytest.raises(TargetError, match="the layout 'gptq' has no place for nvfp4 weights"):
        recipe(layout="gptq", quant="nvfp4")
    with pytest.raises(TargetError, match="the layout 'awq' has no place for the scales of keys and values"):
        recipe(layout="awq", quant="rtn", kv_cache_dtype="fp8")


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_scales_of_keys_and_values_are_where_vllm_looks(tmp_path: Path, kind: str) -> None:
    """One scale [1] for the keys and one for the values of each attention: the largest magnitude over the largest code."""
    program = rewritten(captured("llama"), (QuantizeKVCache(format=kind, granularity="layer"),))  # type: ignore[arg-type]
    write(program, source("llama"), tmp_path / "out")
    scheme = config(tmp_path / "out")["quantization_config"]["kv_cache_scheme"]
    assert (scheme["num_bits"], scheme["strategy"], scheme["dynamic"]) == (8, "tensor", False)
    assert scheme["type"] == {"fp8": "float", "int8": "int"}[kind]
    found = {name: item for name, item in tensors(tmp_path / "out").items() if name.endswith(("k_scale", "v_scale"))}
    assert set(found) == {f"model.layers.{layer}.self_attn.{part}_scale" for layer in (0, 1) for part in "kv"}
    assert all(item.shape == (1,) and item.dtype == torch.float32 and float(item) > 0 for item in found.values())


@pytest.fixture(scope="module")
def mx(tmp_path_factory: pytest.TempPathFactory) -> tuple[Program, Path]:
    program = rewritten(captured("llama"), (QuantizeMxfp4(),))
    out = tmp_path_factory.mktemp("mx") / "out"
    write(program, source("llama"), out)
    return program, out


def test_mxfp4_folders_by_the_library_and_a_second_capture(mx: tuple[Program, Path]) -> None:
    pytest.importorskip("compressed_tensors", reason="needs compressed-tensors (extra test-oracles)")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    program, folder = mx
    settings: Any = QuantizationConfig.model_validate(config(folder)["quantization_config"])
    assert settings.format == "mxfp4-pack-quantized"
    module = "model.layers.1.mlp.down_proj"
    state = {
        name.removeprefix(f"{module}."): item for name, item in tensors(folder).items() if name.startswith(f"{module}.")
    }
    assert state.keys() == {"weight_packed", "weight_scale"}
    scheme = settings.config_groups["group_0"]
    found = BaseCompressor.get_value_from_registry("mxfp4-pack-quantized").decompress(state, scheme)["weight"]
    parts = [program.weight(f"{module}.weight_{part}") for part in ("codes", "scale")]
    assert torch.equal(found.float(), torch.ops.optc.dequantize_mxfp4(*parts, dtype=torch.float32))
    assert torch.equal(logits(capture_pretrained(folder)[0], IDS), logits(program, IDS))


def test_transformers_reads_mxfp4(mx: tuple[Program, Path]) -> None:
    pytest.importorskip("compressed_tensors", reason="needs compressed-tensors (extra test-oracles)")
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    program, folder = mx
    settings = CompressedTensorsConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=settings).eval()
    with torch.no_grad():
        assert float((model(IDS).logits - logits(program, IDS)).abs().max()) < 1e-4


def test_mxfp4_by_hand() -> None:
    """Exponents are the standard's, floor(log2 max) - 2, or one more where that is nearer; the nearest of 15 values."""
    values = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    weight[0, :32] = 0
    weight[1, :32] = torch.linspace(-6, 6, 32) * 2.0**-9
    codes, exponents = quantize_mxfp4(weight)
    made = torch.ops.optc.dequantize_mxfp4(codes, exponents, dtype=torch.float32)
    assert bool((made[0, :32] == 0).all())
    table = torch.tensor([*values, *(-item for item in values)])
    for row, block in ((1, 0), (5, 1), (63, 0)):
        part = weight[row, 32 * block : 32 * block + 32]
        floor = math.floor(math.log2(float(part.abs().max()))) - 2
        errors = []
        for exponent in (floor, floor + 1):
            near = table[(part[:, None] / 2.0**exponent - table).abs().argmin(1)] * 2.0**exponent
            errors.append((float((near - part).square().sum()), exponent))
        error, exponent = min(errors)
        assert int(exponents[row, block]) - 127 == exponent
        assert float((made[row, 32 * block : 32 * block + 32] - part).square().sum()) == pytest.approx(error)
    assert int(exponents[1, 0]) == 127 - 9  # 6 * 2^-9 is the largest code under that power
