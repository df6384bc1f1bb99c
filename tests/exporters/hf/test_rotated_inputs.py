"""Folders whose loader rotates inputs at run time: compressed-tensors' `transform_config`, by its own library too."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from chosen import chosen
from families import FAMILIES
from hf_folders import config, logits, tensors, write
from safetensors.torch import save_file
from stages import apply

from optc.compiler.calibration.sequences import random_calibration
from optc.compiler.capture import capture_model, capture_pretrained
from optc.compiler.diagnostics import InputError, TargetError
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import set_weight
from optc.compiler.ops.dialect.rotation import hadamard, hadamard_signs
from optc.compiler.rewriting.passes import PassContext
from optc.passes.quantization.activations import QuantizeActivations
from optc.passes.quantization.rotate_inputs import RotateInputs
from optc.passes.quantization.rtn import QuantizeRtn
from optc.targets import find_target

IDS = torch.randint(3, 128, (2, 19), generator=torch.Generator().manual_seed(2))
DOWN = "model.layers.0.mlp.down_proj"
TURN = RotateInputs(block_size=32, least_gain=0.0)
"""Turns every input: 64 channels, and 96 of the down projection, in blocks of 32."""


def _source(folder: Path, **more: Any) -> tuple[Program, Path]:
    sizes = {**FAMILIES["llama"][2], "intermediate_size": 96, "num_hidden_layers": 1, **more}
    torch.manual_seed(0)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes)).eval()
    model.save_pretrained(folder)
    return capture_model(model), folder


def _turned(program: Program) -> Program:
    calibration = random_calibration(128, samples=2, length=16, seed=1)
    return TURN.run(program, PassContext(calibration=calibration)).program


def _rounded(program: Program) -> Program:
    weights = apply(QuantizeRtn(bits=8, group_size=0), program).program
    return apply(QuantizeActivations(format="int8"), weights).program


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> tuple[Program, Path]:
    return _source(tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def program(dense: tuple[Program, Path]) -> Program:
    return _rounded(_turned(dense[0]))


@pytest.fixture(scope="module")
def folder(program: Program, dense: tuple[Program, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("folder") / "out"
    write(program, dense[1], out)
    return out


def test_the_config_is_what_vllm_rotates_by(folder: Path) -> None:
    """Its `get_linear_transform_schemes` and `HadamardTransform`: online, by names, "hadamard", blocks of `head_dim`."""
    settings = config(folder)["quantization_config"]
    assert list(settings["config_groups"]) == ["group_0"]
    (group,) = settings["transform_config"]["config_groups"].values()
    assert (group["type"], group["head_dim"], group["randomize"]) == ("hadamard", 32, False)
    (where,) = group["apply"]
    assert (where["location"], where["inverse"]) == ("input", False)
    assert DOWN in where["targets"]
    assert len(where["targets"]) == 7
    held = tensors(folder)[f"{DOWN}.hadamard_32_input.weight"]
    assert torch.equal(held, hadamard_signs(32).to(held.dtype))


def test_a_second_capture_gives_the_programs_logits(
    program: Program, dense: tuple[Program, Path], folder: Path, tmp_path: Path
) -> None:
    again, _ = capture_pretrained(folder)
    assert torch.equal(logits(again, IDS), logits(program, IDS))
    assert len(again.calls(torch.ops.optc.rotate_blocks.default)) == 4  # q, k and v share one, gate and up another
    assert float((logits(again, IDS) - logits(_rounded(dense[0]), IDS)).abs().max()) > 1e-4
    write(again, folder, tmp_path / "again")
    assert config(tmp_path / "again") == config(folder)


def test_the_library_rotates_alike(program: Program, folder: Path) -> None:
    pytest.importorskip("compressed_tensors", reason="needs compressed-tensors (extra test-oracles)")
    from compressed_tensors.transform import TransformConfig, apply_transform_config

    model = hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        without = model(IDS).logits
        said: Any = TransformConfig.model_validate(config(folder)["quantization_config"]["transform_config"])
        apply_transform_config(model, said)
        found = model(IDS).logits
    expected = logits(program, IDS)
    assert float((found - expected).abs().max()) < 2e-2 * float(expected.abs().max())  # single codes move
    assert float((without - expected).abs().max()) > 0.2 * float(expected.abs().max())


def _edited(folder: Path, out: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    shutil.copytree(folder, out)
    whole = config(folder)
    change(whole["quantization_config"]["transform_config"]["config_groups"]["hadamard_32"])
    (out / "config.json").write_text(json.dumps(whole))
    return out


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda group: group.update(type="random-matrix"), "'type' is 'random-matrix'"),
        (lambda group: group.update(randomize=True), "'randomize' is set"),
        (lambda group: group.update(head_dim=24), "'head_dim' is 24, not a power of two"),
        (lambda group: group.update(head_dim=None), "'head_dim' is 0, not a power of two"),
        (lambda group: group.update(head_dim=64), "blocks of 64 do not divide 96 channels"),
        (lambda group: group["apply"][0].update(location="q_attn"), "'location' is 'q_attn'"),
        (lambda group: group.update(apply=["all"]), "'apply' is not a list of objects"),
        (lambda group: group.update(apply=2 * group["apply"]), "its input is rotated twice"),
        (lambda group: group["apply"][0].update(targets=["re:(("]), "the pattern 're:((' cannot be used"),
        (
            lambda group: group["apply"][0].update(ignore=["re:(a|aa)+$" + "|a" * 999]),
            "cannot be used: it has 2006 characters",
        ),
        (lambda group: group["apply"][0].update(ignore=["Linear"]), "no rotation of a quantized linear's input"),
        (lambda group: group["apply"][0].update(ignore=[DOWN]), f"there is '{DOWN}.hadamard_32_input.weight'"),
        (lambda group: group["apply"][0]["targets"].append("lm_head"), "'lm_head' is named"),
    ],
)
def test_other_transforms_are_refused(
    folder: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], reason: str
) -> None:
    with pytest.raises(InputError) as found:
        capture_pretrained(_edited(folder, tmp_path / "out", change))
    assert reason in str(found.value)


@pytest.mark.parametrize("config", [None, {}, {"config_groups": {"hadamard_32": {"type": "hadamard", "apply": None}}}])
def test_a_matrix_without_its_config_is_refused(folder: Path, tmp_path: Path, config: Any) -> None:
    out = tmp_path / "out"
    shutil.copytree(folder, out)
    settings = json.loads((out / "config.json").read_text())
    settings["quantization_config"]["transform_config"] = config
    (out / "config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError) as found:
        capture_pretrained(out)
    assert f"tensor '{DOWN}.hadamard_32_input.weight' rotates the input of a quantized linear" in str(found.value)
    assert "'transform_config' has no rotation of that name" in str(found.value)


def test_another_matrix_in_the_file_is_refused(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(folder, out)
    held = tensors(folder)
    held[f"{DOWN}.hadamard_32_input.weight"].neg_()
    (path,) = out.glob("*.safetensors")
    save_file(held, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match="not the Hadamard matrix of Sylvester"):
        capture_pretrained(out)


def test_transforms_in_weights_are_left_out(folder: Path, tmp_path: Path, program: Program) -> None:
    """Of SpinQuant's R1 and R2 the files hold the outcome; a folder without the matrix is rotated by its config."""

    def change(group: dict[str, Any]) -> None:
        group["apply"] += [{"targets": ["re:.*o_proj"], "location": "weight_output"}]
        group["apply"][0]["targets"] = ["re:.*_proj$"]

    out = _edited(folder, tmp_path / "out", change)
    (path,) = out.glob("*.safetensors")
    held = {name: tensor for name, tensor in tensors(folder).items() if not name.endswith("_input.weight")}
    save_file(held, path, metadata={"format": "pt"})
    assert torch.equal(logits(capture_pretrained(out)[0], IDS), logits(program, IDS))


def test_what_a_loader_cannot_rotate_is_refused(dense: tuple[Program, Path], program: Program, tmp_path: Path) -> None:
    biased, source = _source(tmp_path / "biased", mlp_bias=True)
    with pytest.raises(TargetError, match="cannot be written") as found:
        write(_rounded(_turned(biased)), source, tmp_path / "a")
    assert "vLLM adds no bias behind a rotation" in str(found.value)
    with pytest.raises(TargetError) as found:
        write(_turned(dense[0]), dense[1], tmp_path / "b")
    assert "which is done for quantized linears" in str(found.value)
    weights = apply(QuantizeRtn(bits=8, group_size=32), _turned(dense[0])).program
    with pytest.raises(TargetError) as found:
        write(weights, dense[1], tmp_path / "c", "gptq")
    assert "its input is rotated at run time; use --layout compressed-tensors" in str(found.value)
    other = program.clone()
    set_weight(other, "hadamard_32", -hadamard(32).float())
    with pytest.raises(TargetError, match=re.escape("cannot be written")) as found:
        write(other.changed(), dense[1], tmp_path / "d")
    assert "another matrix than Hadamard's" in str(found.value)


def test_the_target_rotates_by_a_method_of_its_own() -> None:
    def recipe(quant: str, **options: Any) -> list[str]:
        steps = find_target("vllm").recipe("decoder", chosen("vllm", dtype="bf16", quant=quant, **options))
        return [step.rewrite.name for step in steps]

    assert recipe("smoothquant-rotated") == [
        "scale-smoothquant",
        "rotate-inputs",
        "quantize-gptq",
        "quantize-activations",
    ]
    assert recipe("smoothquant") == ["scale-smoothquant", "quantize-gptq", "quantize-activations"]
    with pytest.raises(TargetError, match="has no place for smoothquant-rotated weights"):
        recipe("smoothquant-rotated", layout="gptq")
