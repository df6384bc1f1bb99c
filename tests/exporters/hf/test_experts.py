"""Mixtures of experts in model folders: each expert under its name in the checkpoint, by readers of others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from families import FAMILIES
from hf_folders import config, logits, source, tensors, write
from stages import apply, captured
from torch import Tensor

from optc.compiler.capture import capture_model, capture_pretrained
from optc.compiler.capture.loading import meta_model
from optc.compiler.capture.renames import ExpertRows, expert_rows
from optc.compiler.diagnostics import InputError
from optc.compiler.ir.program import Program
from optc.compiler.model_folder.checkpoint import check_folder
from optc.passes.quantization.activations import QuantizeActivations
from optc.passes.quantization.fp8 import QuantizeFp8
from optc.passes.quantization.rtn import QuantizeRtn

IDS = torch.randint(3, 128, (2, 19), generator=torch.Generator().manual_seed(2))
INT4 = QuantizeRtn(group_size=32)


@pytest.fixture(scope="module")
def mixtral() -> Program:
    return captured("mixtral")


@pytest.fixture(scope="module")
def folder(mixtral: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("experts") / "out"
    write(apply(INT4, mixtral).program, source("mixtral"), out)
    return out


def test_the_rows_of_each_expert_are_found() -> None:
    skeleton = meta_model(check_folder(source("mixtral")))
    found = expert_rows(skeleton, skeleton.state_dict())
    assert len(found) == 2 * 4 * 3
    prefix, stack = "model.layers.1.block_sparse_moe.experts.2", "model.layers.1.mlp.experts"
    assert found[f"{prefix}.w1.weight"] == ExpertRows(f"{stack}.gate_up_proj", 2, 0, 128)
    assert found[f"{prefix}.w3.weight"] == ExpertRows(f"{stack}.gate_up_proj", 2, 128, 256)
    assert found[f"{prefix}.w2.weight"] == ExpertRows(f"{stack}.down_proj", 2, 0, 64)


def test_an_unquantized_folder_is_the_source_again(mixtral: Program, tmp_path: Path) -> None:
    write(mixtral, source("mixtral"), tmp_path)
    before, after = tensors(source("mixtral")), tensors(tmp_path)
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_each_expert_has_codes_under_its_name_and_the_router_none(folder: Path) -> None:
    names = tensors(folder).keys()
    experts = {name for name in names if ".experts." in name}
    parts = ("weight_packed", "weight_scale", "weight_shape")
    places = [
        f"model.layers.{i}.block_sparse_moe.experts.{e}.w{n}" for i in (0, 1) for e in range(4) for n in (1, 2, 3)
    ]
    assert experts == {f"{place}.{part}" for place in places for part in parts}
    settings = config(folder)["quantization_config"]
    assert settings["ignore"] == ["lm_head", *(f"model.layers.{i}.block_sparse_moe.gate" for i in (0, 1))]
    assert "model.layers.0.block_sparse_moe.gate.weight" in names


def test_a_second_capture_gives_the_programs_logits(mixtral: Program, folder: Path) -> None:
    again, _ = capture_pretrained(folder)
    ours = logits(apply(INT4, mixtral).program, IDS)
    assert torch.equal(logits(again, IDS), ours)
    assert float((ours - logits(mixtral, IDS)).abs().max()) > 0.01  # something was rounded


def test_transformers_computes_the_same_of_the_librarys_weights(mixtral: Program, folder: Path) -> None:
    """compressed-tensors dequantizes each expert, transformers stacks and runs them."""
    pytest.importorskip("compressed_tensors", reason="needs compressed-tensors (extra test-oracles)")
    state = _dense(folder)
    plain = hf.MixtralConfig.from_pretrained(source("mixtral"))
    model = hf.MixtralForCausalLM.from_pretrained(None, config=plain, state_dict=state, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = model(IDS).logits
    assert float((theirs - logits(apply(INT4, mixtral).program, IDS)).abs().max()) < 1e-4


@pytest.mark.parametrize("layout", ["gptq", "awq"])
def test_other_layouts_hold_experts_too(mixtral: Program, tmp_path: Path, layout: str) -> None:
    from optc.passes.quantization.round_scales import RoundScales

    program = apply(RoundScales(), apply(INT4, mixtral).program).program
    write(program, source("mixtral"), tmp_path, layout)
    assert "model.layers.0.block_sparse_moe.experts.3.w2.qweight" in tensors(tmp_path)
    again, _ = capture_pretrained(tmp_path)
    assert torch.equal(logits(again, IDS), logits(program, IDS))


def test_experts_in_fp8_with_rounded_inputs(mixtral: Program, tmp_path: Path) -> None:
    program = apply(QuantizeActivations(format="fp8"), apply(QuantizeFp8(), mixtral).program).program
    write(program, source("mixtral"), tmp_path)
    held = tensors(tmp_path)
    place = "model.layers.0.block_sparse_moe.experts.1"
    assert [tuple(held[f"{place}.{name}.weight_scale"].shape) for name in ("w1", "w2")] == [(128, 1), (64, 1)]
    again, _ = capture_pretrained(tmp_path)
    assert torch.equal(logits(again, IDS), logits(program, IDS))


def test_experts_of_qwen3_moe_have_other_names(tmp_path: Path) -> None:
    sizes = {**FAMILIES["qwen3"][2], "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    torch.manual_seed(0)
    model = hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**sizes)).eval()
    model.save_pretrained(tmp_path / "source")
    program = apply(INT4, capture_model(model)).program
    write(program, tmp_path / "source", tmp_path / "out")
    assert "model.layers.1.mlp.experts.3.gate_proj.weight_packed" in tensors(tmp_path / "out")
    assert "model.layers.1.mlp.gate" in config(tmp_path / "out")["quantization_config"]["ignore"]
    again, _ = capture_pretrained(tmp_path / "out")
    assert torch.equal(logits(again, IDS), logits(program, IDS))


def test_parts_of_an_expert_that_differ_are_refused(folder: Path, tmp_path: Path) -> None:
    """Its gate and up projection are one product in the model."""
    shutil.copytree(folder, tmp_path / "out")
    settings = config(folder)
    (group,) = settings["quantization_config"]["config_groups"].values()
    other: Any = {**group, "targets": ["re:.*experts.1.w3"], "weights": {**group["weights"], "strategy": "group"}}
    other["input_activations"] = {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "strategy": "token",
        "dynamic": True,
    }
    settings["quantization_config"]["config_groups"] = {"group_0": group, "group_1": other}
    (tmp_path / "out" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="that the model computes together are quantized differently"):
        capture_pretrained(tmp_path / "out")


def _dense(folder: Path) -> dict[str, Tensor]:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    settings: Any = QuantizationConfig.model_validate(config(folder)["quantization_config"])
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    held = tensors(folder)
    out = {name: tensor for name, tensor in held.items() if not name.rpartition(".")[2].startswith("weight_")}
    for name in held:
        module, _, last = name.rpartition(".")
        if last == "weight_packed":
            parts = {key.rpartition(".")[2]: held[key] for key in held if key.rpartition(".")[0] == module}
            out[f"{module}.weight"] = compressor.decompress(parts, settings.config_groups["group_0"])["weight"]
    return out
