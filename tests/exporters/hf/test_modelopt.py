"""ModelOpt folders: every byte by a reader of the tests' own, transformers' logits, refusals."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from hf_folders import config, logits, source, tensors
from modelopt_folders import RECIPES, dense, made, modules, rewritten, transformers_logits, write
from stages import captured

from optc.compiler.capture import capture_pretrained
from optc.compiler.diagnostics import ArtifactError, TargetError
from optc.compiler.formats.layouts import QuantizedWeight, Scheme
from optc.compiler.formats.layouts.modelopt.writer import ModelOptWriter, algorithm_of
from optc.compiler.ir.surgery import set_weight
from optc.compiler.target.target import ExportRequest
from optc.exporters.hf import FolderOptions, export_hf
from optc.exporters.hf import export as module
from optc.exporters.hf.shards import write_shards
from optc.passes.kv_cache.quantize import QuantizeKVCache
from optc.passes.quantization.activations import QuantizeActivations
from optc.passes.quantization.fp8 import QuantizeFp8
from optc.passes.quantization.inputs import QuantizeInputs
from optc.passes.quantization.nvfp4 import QuantizeNvfp4
from optc.passes.quantization.rtn import QuantizeRtn
from optc.passes.quantization.scale_smoothquant import ScaleSmoothQuant

IDS = torch.randint(0, 128, (2, 24), generator=torch.Generator().manual_seed(1))
CASES = [("llama", name) for name in RECIPES] + [("qwen2", "FP8")]


@pytest.mark.parametrize(("family", "algorithm"), CASES)
def test_transformers_and_a_second_capture_give_the_programs_logits(
    tmp_path: Path, family: str, algorithm: str
) -> None:
    program = made(family, algorithm)
    result = write(program, source(family), tmp_path)
    ours = logits(program, IDS)
    theirs = transformers_logits(tmp_path, source(family), algorithm, IDS)
    assert float((ours - theirs).abs().max()) <= 1e-4
    assert float((ours - logits(captured(family), IDS)).abs().max()) > 0.01  # something was rounded
    again, _ = capture_pretrained(tmp_path)
    assert torch.equal(logits(again, IDS), ours)
    assert result.info["layout"] == "modelopt"
    assert result.info["quantized_linears"] == (14 if algorithm else 0)
    assert result.weight_bytes == (tmp_path / "model.safetensors").stat().st_size
    settings = json.loads((tmp_path / "hf_quant_config.json").read_text())
    assert settings["producer"]["name"] == "optc"
    assert settings["quantization"]["quant_algo"] == (algorithm or None)
    assert config(tmp_path)["quantization_config"]["quant_method"] == "modelopt"


def test_scales_of_inputs_are_in_the_norms_and_in_earlier_rows(tmp_path: Path) -> None:
    """q, k, v, gate and up have no pre_quant_scale, which TensorRT-LLM would not read; o and down have ones."""
    program = rewritten(captured("llama"), (ScaleSmoothQuant(), *RECIPES["W4A16_AWQ"]))
    write(program, source("llama"), tmp_path)
    found = modules(tmp_path)
    have = {name.rpartition(".")[2] for name, parts in found.items() if "pre_quant_scale" in parts}
    assert have == {"o_proj", "down_proj"}
    assert all(bool((parts["pre_quant_scale"] == 1).all()) for parts in found.values() if "pre_quant_scale" in parts)
    norm = "model.layers.0.input_layernorm.weight"
    assert not torch.equal(tensors(tmp_path)[norm], tensors(source("llama"))[norm])
    theirs = transformers_logits(tmp_path, source("llama"), "W4A16_AWQ", IDS)
    assert float((logits(program, IDS) - theirs).abs().max()) <= 1e-4


def test_nibbles_by_hand() -> None:
    """Rows 2i and 2i+1 share a byte in W4A16_AWQ, columns in NVFP4; the first is the low nibble."""
    codes = torch.tensor([[8, 9], [0, 15]], dtype=torch.uint8)  # values 0 1 / -8 7
    weight = QuantizedWeight(Scheme(bits=4, group_size=64, symmetric=True), codes, torch.ones(2, 1))
    assert ModelOptWriter().tensors(weight)["weight"].tolist() == [[0x80, 0x71]]
    scheme = Scheme(bits=4, group_size=16, symmetric=True, format="nvfp4", activations="nvfp4", static=True)
    weight = QuantizedWeight(
        scheme,
        torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8),
        torch.ones(1, 1).to(torch.float8_e4m3fn),
        global_scale=torch.ones(1),
        input_scale=torch.ones(1),
    )
    written = ModelOptWriter().tensors(weight)
    assert written["weight"].tolist() == [[0x21, 0x0F]]
    assert [tuple(written[name].shape) for name in ("weight_scale_2", "input_scale")] == [(), ()]


@pytest.mark.parametrize("algorithm", [name for name in RECIPES if name])
def test_types_and_values_of_a_linear(tmp_path: Path, algorithm: str) -> None:
    program = made("llama", algorithm)
    write(program, source("llama"), tmp_path)
    name = "model.layers.1.mlp.up_proj"
    parts = modules(tmp_path)[name]
    types = {key: (str(value.dtype).removeprefix("torch."), list(value.shape)) for key, value in parts.items()}
    assert (
        types
        == {
            "W4A16_AWQ": {"weight": ("uint8", [64, 64]), "weight_scale": ("float32", [128, 1])},
            "W8A16": {"weight": ("int8", [128, 64]), "weight_scale": ("float32", [128])},
            "FP8": {
                "weight": ("float8_e4m3fn", [128, 64]),
                "weight_scale": ("float32", []),
                "input_scale": ("float32", []),
            },
            "NVFP4": {
                "weight": ("uint8", [128, 32]),
                "weight_scale": ("float8_e4m3fn", [128, 4]),
                "weight_scale_2": ("float32", []),
                "input_scale": ("float32", []),
            },
        }[algorithm]
    )
    original = captured("llama").weight(f"{name}.weight").double()
    gap = (dense(parts, algorithm) - original).norm() / original.norm()
    bounds = {"W4A16_AWQ": (0.05, 0.2), "W8A16": (0.002, 0.02), "FP8": (0.01, 0.05), "NVFP4": (0.05, 0.2)}
    low, high = bounds[algorithm]
    assert low < float(gap) < high


def test_a_plain_model_has_no_quantization(tmp_path: Path) -> None:
    result = write(captured("llama"), source("llama"), tmp_path)
    assert not (tmp_path / "hf_quant_config.json").exists()
    assert "quantization_config" not in config(tmp_path)
    assert result.info["layout"] == "none"
    assert (tmp_path / "serve.yaml").is_file()
    before, after = tensors(source("llama")), tensors(tmp_path)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("algorithm", "name"),
    [
        ("FP8", "model.layers.1.mlp.up_proj.input_scale"),
        ("FP8", "model.layers.1.self_attn.k_proj.k_scale"),
        ("NVFP4", "model.layers.0.mlp.down_proj.weight_scale_2"),
        ("NVFP4", "model.layers.0.mlp.down_proj.weight"),
        ("W4A16_AWQ", "model.layers.0.mlp.down_proj.pre_quant_scale"),
        ("W8A16", "model.layers.0.mlp.down_proj.weight_scale"),
    ],
)
def test_a_changed_number_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str, name: str
) -> None:
    def spoiled(folder, items):  # type: ignore[no-untyped-def]
        def change():  # type: ignore[no-untyped-def]
            for key, tensor in items:
                if key == name:
                    tensor = tensor.clone()
                    tensor.view(-1)[0] += 1
                yield key, tensor

        return write_shards(folder, change())

    monkeypatch.setattr(module, "write_shards", spoiled)
    with pytest.raises(ArtifactError, match="a written weight differs from the one in memory") as caught:
        write(made("llama", algorithm), source("llama"), tmp_path)
    assert name.rpartition(".")[0] in str(caught.value.where)


REFUSED = {
    "asym": (
        (QuantizeRtn(group_size=64, symmetric=False),),
        "the layout has no algorithm for 4-bit int weights in groups of 64 with zero points",
    ),
    "group": ((QuantizeRtn(group_size=32),), "TensorRT-LLM's kernels take 64 and 128"),
    "w8a8": ((QuantizeRtn(bits=8, group_size=0), QuantizeActivations()), "int8 inputs by per-token scales"),
    "int8-static": (
        (QuantizeRtn(bits=8, group_size=0), QuantizeInputs(format="int8")),
        "int8 inputs by calibrated scales",
    ),
    "fp8-weights": ((QuantizeFp8(granularity="tensor"),), "the layout has no algorithm for 8-bit fp8 weights"),
    "nvfp4-weights": ((QuantizeNvfp4(),), "the layout has no algorithm for 4-bit nvfp4 weights"),
    "apart": (
        (QuantizeRtn(group_size=64, ignore=("*.k_proj.*",)),),
        "k_proj has the same input, and is quantized differently or not at all",
    ),
    "kv-int8": ((QuantizeKVCache(format="int8", granularity="layer"),), "fp8 with one scale per layer"),
    "kv-head": ((QuantizeKVCache(format="fp8", granularity="head"),), "fp8 with one scale per layer"),
    "mixed": (
        (QuantizeRtn(group_size=64, ignore=("*.down_proj.*",)), QuantizeRtn(bits=8, group_size=0)),
        "there are W4A16_AWQ g64, W8A16 g0",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_its_loader_lacks_is_refused(tmp_path: Path, case: str) -> None:
    passes, why = REFUSED[case]
    with pytest.raises(TargetError) as caught:
        write(rewritten(captured("llama"), passes), source("llama"), tmp_path)
    assert why in str(caught.value.why)
    assert caught.value.remedy
    assert not list(tmp_path.iterdir())


def test_unequal_global_scales_are_refused(tmp_path: Path) -> None:
    program = made("llama", "NVFP4").clone()
    name = "model.layers.0.self_attn.k_proj.weight_global_scale"
    set_weight(program, name, program.weight(name) * 2)
    with pytest.raises(TargetError, match="cannot load") as caught:
        write(program, source("llama"), tmp_path)
    assert "another weight_scale_2" in str(caught.value.why)


@pytest.mark.parametrize("algorithm", ["FP8", "NVFP4", ""])
def test_other_layouts_refuse_what_only_this_one_holds(tmp_path: Path, algorithm: str) -> None:
    program = rewritten(captured("llama"), RECIPES[algorithm][: 1 if not algorithm else 2])
    layout = None if algorithm == "FP8" else "awq"
    request = ExportRequest(directory=tmp_path, options=FolderOptions(layout=layout), source=source("llama"))
    with pytest.raises(TargetError) as caught:
        export_hf(program, request)
    text = f"{caught.value.what} {caught.value.why}"
    assert {
        "FP8": "calibrated scale",
        "NVFP4": "nvfp4 weights",
        "": "no place for the scales of keys and values",
    }[algorithm] in text
    assert not list(tmp_path.iterdir())


def test_scales_of_keys_and_values_go_on_to_compressed_tensors(tmp_path: Path) -> None:
    """One layout's scales, captured and written in the other's: the same numbers under other names."""
    write(made("llama", ""), source("llama"), tmp_path / "a")
    program = capture_pretrained(tmp_path / "a")[0]
    (tmp_path / "b").mkdir()
    request = ExportRequest(directory=tmp_path / "b", options=FolderOptions(), source=tmp_path / "a")
    result = export_hf(program, request)
    scheme = result.info["quantization_config"]["kv_cache_scheme"]
    assert (scheme["type"], scheme["num_bits"], scheme["strategy"]) == ("float", 8, "tensor")
    before, after = tensors(tmp_path / "a"), tensors(tmp_path / "b")
    for letter in "kv":
        name = f"model.layers.1.self_attn.{letter}_proj.{letter}_scale"
        assert torch.equal(after[f"model.layers.1.self_attn.{letter}_scale"], before[name].reshape(1))
    assert torch.equal(logits(capture_pretrained(tmp_path / "b")[0], IDS), logits(made("llama", ""), IDS))


def test_two_rows_share_a_byte() -> None:
    scheme = Scheme(bits=4, group_size=64, symmetric=True)
    weight = QuantizedWeight(scheme, torch.zeros(3, 64, dtype=torch.uint8), torch.ones(3, 1))
    assert ModelOptWriter().obstacle(weight) == "two rows share a byte, and it has 3"
    assert algorithm_of(dataclasses.replace(scheme, bits=3)) is None
