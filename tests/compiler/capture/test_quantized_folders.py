"""Model folders that are already quantized: the codes of the folder, and refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import make_model
from hf_folders import codes_of, config, logits, quantized, source, tensors, write
from safetensors.torch import save_file

import optc
from optc.compiler.capture import capture_pretrained
from optc.compiler.capture.loading import load_model
from optc.compiler.diagnostics import CaptureError, InputError, OptcError, UsageError
from optc.planning import make_plan
from optc.request import from_python

K_PROJ = "model.layers.1.self_attn.k_proj"

_FAMILIES = {
    ("int4", "compressed-tensors"): ("llama", "phi3"),
    ("int4", "awq"): ("phi3",),
    ("int4", "gptq"): ("llama",),
}
CASES = [
    (family, recipe, layout)
    for recipe, layout in (
        ("int4", "compressed-tensors"),
        ("int4-asym", "compressed-tensors"),
        ("int4-channel", "compressed-tensors"),
        ("int8", "compressed-tensors"),
        ("w8a8", "compressed-tensors"),
        ("fp8", "compressed-tensors"),
        ("fp8-weights", "compressed-tensors"),
        ("int4", "awq"),
        ("int4-asym", "awq"),
        ("int4", "gptq"),
        ("int4-asym", "gptq"),
        ("int8", "gptq"),
    )
    for family in _FAMILIES.get((recipe, layout), ("qwen2",))
]


@pytest.mark.parametrize(("family", "recipe", "layout"), CASES)
def test_out_and_in_again_gives_the_same_program(tmp_path: Path, family: str, recipe: str, layout: str) -> None:
    program = quantized(family, recipe, half=layout != "compressed-tensors")
    write(program, source(family), tmp_path, layout)
    again, info = capture_pretrained(tmp_path)
    ours, theirs = codes_of(program), codes_of(again)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert theirs[name].stride() == tensor.stride(), name
        assert torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8)), name
    ids = torch.randint(3, 128, (2, 17), generator=torch.Generator().manual_seed(0))
    assert torch.equal(logits(program, ids), logits(again, ids))
    for name, entry in again.contract.quantization.items():
        mine = program.contract.quantization[name]
        assert entry.method == layout
        assert (entry.bits, entry.group_size, entry.symmetric, entry.format, entry.activations, entry.source) == (
            mine.bits,
            mine.group_size,
            mine.symmetric,
            mine.format,
            mine.activations,
            mine.source,
        )
    assert info.path == tmp_path


def test_one_layout_becomes_another(tmp_path: Path) -> None:
    program = quantized("llama", "int4-asym", half=True)
    write(program, source("llama"), tmp_path / "a", "awq")
    write(capture_pretrained(tmp_path / "a")[0], tmp_path / "a", tmp_path / "g", "gptq")
    write(capture_pretrained(tmp_path / "g")[0], tmp_path / "g", tmp_path / "c", "compressed-tensors")
    again, _ = capture_pretrained(tmp_path / "c")
    ours, theirs = codes_of(program), codes_of(again)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert config(tmp_path / "c")["quantization_config"]["quant_method"] == "compressed-tensors"
    assert not any(name.endswith(("qweight", "g_idx")) for name in tensors(tmp_path / "c"))


def test_the_dense_model_holds_the_values_of_the_codes(tmp_path: Path) -> None:
    program = quantized("llama", "int4-asym")
    write(program, source("llama"), tmp_path)
    model, _ = load_model(tmp_path, dtype=torch.float32, attention="eager")
    ids = torch.randint(3, 128, (2, 17), generator=torch.Generator().manual_seed(0))
    assert float((model(ids).logits - logits(program, ids)).abs().max()) < 1e-5


def test_compiled_further_without_requantizing(tmp_path: Path) -> None:
    write(quantized("llama", "int4"), source("llama"), tmp_path / "q")
    result = optc.compile(tmp_path / "q", target="onnx-cpu", output=tmp_path / "onnx")
    summary = result.manifest.quantization
    assert (summary["method"], summary["bits"]) == ("compressed-tensors", [4])
    assert any(record.name == "legalize-ort" and record.matched for record in result.manifest.passes)
    text = optc.load(tmp_path / "onnx").generate([5, 6, 7, 8], max_new_tokens=6)
    ids = torch.tensor([[5, 6, 7, 8]])
    first = int(logits(quantized("llama", "int4"), ids)[0, -1].argmax())
    assert text.tokens[0] == first
    with pytest.raises(UsageError, match="the model is already quantized") as caught:
        optc.compile(tmp_path / "q", target="onnx-cpu", quant="rtn", output=tmp_path / "twice")
    assert "by compressed-tensors" in str(caught.value)


def test_the_plan_counts_what_the_folder_holds(tmp_path: Path) -> None:
    write(quantized("llama", "int4"), source("llama"), tmp_path)
    plan = make_plan(tmp_path, from_python("onnx-cpu"))
    assert plan["weight_bytes"] == sum(tensor.nbytes for tensor in tensors(tmp_path).values())
    assert plan["note"] == "quantized already (compressed-tensors): 14 linears keep their codes"
    with pytest.raises(UsageError, match="already quantized"):
        make_plan(tmp_path, from_python("onnx-cpu", quant="rtn"))


_GROUP = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
_TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}


@pytest.mark.parametrize(
    ("weights", "inputs", "kind"),
    [
        ({**_GROUP, "symmetric": True}, None, ("int", "")),
        ({**_GROUP, "symmetric": False}, None, ("int", "")),
        ({"num_bits": 8, "type": "int", "strategy": "channel"}, _TOKEN, ("int", "int8")),
        (
            {"num_bits": 8, "type": "float", "strategy": "channel"},
            {**_TOKEN, "type": "float"},
            ("fp8", "fp8"),
        ),
        ({"num_bits": 8, "type": "float", "strategy": "tensor"}, {**_TOKEN, "type": "float"}, ("fp8", "fp8")),
    ],
)
def test_a_folder_written_by_compressed_tensors(
    tmp_path: Path, weights: dict[str, Any], inputs: dict[str, Any] | None, kind: tuple[str, str]
) -> None:
    pytest.importorskip("compressed_tensors", reason="needs compressed-tensors (extra test-oracles)")
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams

    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    settings = QuantizationConfig(config_groups={"group_0": group}, ignore=["lm_head"])
    model = make_model("llama")
    apply_quantization_config(model, settings)
    dense: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if not hasattr(module, "weight_scale"):
            continue
        args = module.quantization_scheme.weights
        size = {"group": 32, "channel": module.weight.shape[1]}.get(weights["strategy"])
        parts = module.weight.unflatten(1, (-1, size)) if size else module.weight[None, None]
        axes = (-1,) if size else (-2, -1)
        scale, zero = calculate_qparams(parts.amin(axes), parts.amax(axes), args)
        module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
        module.weight_zero_point.data.copy_(zero.reshape(module.weight_scale.shape))
        dense[f"{name}.weight"] = module.weight
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(tmp_path)
    compressor.update_config(tmp_path)
    compressor.decompress_model(model)
    program, _ = capture_pretrained(tmp_path)
    assert len(program.contract.quantization) == len(dense) == 14
    kinds = {(entry.format, entry.activations) for entry in program.contract.quantization.values()}
    assert kinds == {kind}
    read, _ = load_model(tmp_path, dtype=torch.float32, attention="eager")
    for name, module in model.named_modules():
        if f"{name}.weight" in dense:
            assert torch.equal(read.get_submodule(name).weight, module.weight), name


# -- refusals ------------------------------------------------------------------------------------


def _written(folder: Path, recipe: str = "int4", layout: str = "compressed-tensors") -> Path:
    write(quantized("llama", recipe, half=True), source("llama"), folder, layout)
    return folder


def _edit(folder: Path, **changes: Any) -> None:
    """Change quantization_config; None removes a key."""
    values = config(folder)
    inner = values["quantization_config"]
    inner.update(changes)
    values["quantization_config"] = {key: value for key, value in inner.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(values))


def _rewrite(folder: Path, **changes: torch.Tensor | None) -> None:
    """Change tensors; dots in names are written as two underscores."""
    found = tensors(folder)
    for key, tensor in changes.items():
        name = key.replace("__", ".")
        if tensor is None:
            del found[name]
        else:
            found[name] = tensor
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})


def _refused(folder: Path, kind: type[OptcError] = InputError) -> str:
    with pytest.raises(kind) as caught:
        capture_pretrained(folder)
    assert caught.value.exit_code == 3
    return str(caught.value)


def test_unknown_methods_are_refused_with_those_that_are_taken(tmp_path: Path) -> None:
    folder = _written(tmp_path)
    _edit(folder, quant_method="hqq")
    text = _refused(folder)
    assert "'quant_method' is 'hqq'" in text
    assert "optc takes compressed-tensors, awq, gptq" in text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"format": "marlin-24"}, "'format' is 'marlin-24'"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "'kv_cache_scheme' is set"),
        ({"config_groups": {"W4A16": ["Linear"]}}, "'W4A16' is not an object"),
        ({"config_groups": 5}, "'config_groups' is not an object"),
    ],
)
def test_compressed_tensors_that_optc_does_not_read(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    folder = _written(tmp_path)
    _edit(folder, **changes)
    assert expected in _refused(folder)


@pytest.mark.parametrize(
    ("part", "key", "value", "expected"),
    [
        ("weights", "num_bits", 6, "'num_bits' is 6"),
        ("weights", "num_bits", "4", "not a whole number"),
        ("weights", "strategy", "block", "'strategy' is 'block'"),
        ("weights", "type", "float", "optc takes channel, tensor"),
        ("weights", "group_size", 48, "does not divide the weight"),
        ("weights", "group_size", 64, "the scales have the wrong shape"),
        (None, "output_activations", {"num_bits": 8}, "does not round outputs"),
        (
            None,
            "input_activations",
            {"num_bits": 8, "strategy": "tensor", "dynamic": False},
            "per token at run time",
        ),
    ],
)
def test_schemes_that_optc_does_not_read(tmp_path: Path, part: str | None, key: str, value: Any, expected: str) -> None:
    folder = _written(tmp_path)
    groups = config(folder)["quantization_config"]["config_groups"]
    (groups["group_0"][part] if part else groups["group_0"])[key] = value
    _edit(folder, config_groups=groups)
    assert expected in _refused(folder)


def test_damaged_tensors_are_named(tmp_path: Path) -> None:
    scale = tensors(_written(tmp_path / "a"))[f"{K_PROJ}.weight_scale"]
    key = K_PROJ.replace(".", "__")
    cases: list[tuple[str, torch.Tensor | None, str]] = [
        ("weight_scale", torch.full_like(scale, float("nan")), "not finite"),
        ("weight_scale", scale[:, :1].clone(), "the scales have the wrong shape"),
        ("weight_scale", scale.to(torch.int32), "the wrong type"),
        ("weight_packed", None, "missing tensor"),
        ("weight_scale", None, "missing tensor"),
        ("weight_packed", torch.zeros(32, 7, dtype=torch.int32), "wrong shape"),
        ("weight_packed", torch.zeros(32, 8, dtype=torch.int64), "the wrong type"),
        ("weight_shape", torch.tensor([32, 99]), "wrong shape"),
    ]
    for number, (suffix, tensor, expected) in enumerate(cases):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "a", folder)
        _rewrite(folder, **{f"{key}__{suffix}": tensor})
        text = _refused(folder)
        assert expected in text, (suffix, text)
        assert K_PROJ in text, (suffix, text)


def test_groups_of_several_sizes_are_refused(tmp_path: Path) -> None:
    folder = _written(tmp_path, layout="gptq")
    key = f"{K_PROJ}.g_idx".replace(".", "__")
    for groups, message in [
        (torch.arange(64) // 33, "not every group has 32 columns"),
        (torch.zeros(32), "wrong shape"),
    ]:
        _rewrite(folder, **{key: groups.to(torch.int32)})
        text = _refused(folder)
        assert f"{K_PROJ}.g_idx" in text
        assert message in text


def test_a_gptq_folder_without_g_idx_is_read(tmp_path: Path) -> None:
    folder = _written(tmp_path, layout="gptq")
    _rewrite(folder, **{name.replace(".", "__"): None for name in tensors(folder) if name.endswith("g_idx")})
    again, _ = capture_pretrained(folder)
    ours = codes_of(quantized("llama", "int4", half=True))
    assert all(torch.equal(ours[name], again.weight(name)) for name in ours)
    _edit(folder, desc_act=True)
    assert "'desc_act' is true" in _refused(folder)


@pytest.mark.parametrize(
    ("layout", "changes", "expected"),
    [
        ("gptq", {"bits": 5}, "'bits' is 5"),
        ("gptq", {"group_size": -2}, "'group_size' is -2"),
        ("gptq", {"checkpoint_format": "marlin"}, "'checkpoint_format' is 'marlin'"),
        ("gptq", {"dynamic": {"+:.*down.*": {"bits": 8}}}, "separate settings"),
        ("gptq", {"bits": 8}, "wrong shape"),
        ("awq", {"version": "gemv"}, "'version' is 'gemv'"),
        ("awq", {"bits": 8}, "'bits' is 8"),
        ("awq", {"zero_point": False}, "'zero_point' is False"),
        ("awq", {"group_size": 64}, "the scales have the wrong shape"),
    ],
)
def test_awq_and_gptq_that_optc_does_not_read(
    tmp_path: Path, layout: str, changes: dict[str, Any], expected: str
) -> None:
    folder = _written(tmp_path, layout=layout)
    _edit(folder, **changes)
    assert expected in _refused(folder)


def test_a_zero_point_that_readers_take_differently_is_refused(tmp_path: Path) -> None:
    folder = _written(tmp_path, layout="gptq")
    name = f"{K_PROJ}.qzeros"
    _rewrite(folder, **{name.replace(".", "__"): torch.full_like(tensors(folder)[name], -1)})
    assert "a zero point above 15" in _refused(folder)


def test_a_folder_that_says_quantized_and_is_not(tmp_path: Path) -> None:
    write(quantized("llama", "none"), source("llama"), tmp_path)
    values = config(tmp_path)
    values["quantization_config"] = config(_written(tmp_path / "q"))["quantization_config"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert "no linear of the weight files is quantized" in _refused(tmp_path)


def test_a_quantized_weight_outside_linears_is_refused(tmp_path: Path) -> None:
    folder = _written(tmp_path)
    found = tensors(folder)
    stem = "model.embed_tokens"
    del found[f"{stem}.weight"]
    found |= {
        f"{stem}.weight_packed": torch.zeros(128, 8, dtype=torch.int32),
        f"{stem}.weight_scale": torch.ones(128, 2),
        f"{stem}.weight_shape": torch.tensor([128, 64]),
    }
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    text = _refused(folder, CaptureError)
    assert f"{stem}.weight" in text
    assert "reads it outside linears too" in text
