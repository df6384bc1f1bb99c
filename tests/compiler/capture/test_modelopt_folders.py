"""Folders in ModelOpt's layout that are not as they should be, and what is done with good ones."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_folders import config, logits, source, tensors
from modelopt_folders import made, write
from safetensors.torch import save_file

from optc.compiler.capture import capture_pretrained
from optc.compiler.diagnostics import InputError, UsageError
from optc.compiler.model_folder.checkpoint import check_folder
from optc.compiler.model_folder.quantized import quantized_folder
from optc.planning import make_plan
from optc.request import from_python

IDS = torch.arange(3, 20)[None]
UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """algorithm -> a folder; read-only."""

    @functools.cache
    def folder(algorithm: str) -> Path:
        out = tmp_path_factory.mktemp("folder")
        write(made("llama", algorithm), source("llama"), out)
        return out

    return folder


def _copy(folder: Path, tmp_path: Path, **changed: Any) -> Path:
    """A copy of a folder with other tensors (None: taken out)."""
    out = tmp_path / "copy"
    shutil.copytree(folder, out)
    table = {**tensors(folder), **{name.replace("__", "."): value for name, value in changed.items()}}
    kept = {name: value.contiguous() for name, value in table.items() if value is not None}
    save_file(kept, out / "model.safetensors", metadata={"format": "pt"})
    return out


def _settings(folder: Path, **changed: Any) -> None:
    path = folder / "hf_quant_config.json"
    settings = json.loads(path.read_text())
    settings["quantization"] |= changed
    path.write_text(json.dumps(settings))


def test_either_config_is_enough(tmp_path: Path, folders: Callable[[str], Path]) -> None:
    """Older exports say it in hf_quant_config.json alone, others in config.json alone."""
    ours = logits(made("llama", "W4A16_AWQ"), IDS)
    first = _copy(folders("W4A16_AWQ"), tmp_path)
    (first / "hf_quant_config.json").unlink()
    assert torch.equal(logits(capture_pretrained(first)[0], IDS), ours)
    shutil.rmtree(first)
    second = _copy(folders("W4A16_AWQ"), tmp_path)
    plain = {key: value for key, value in config(second).items() if key != "quantization_config"}
    (second / "config.json").write_text(json.dumps(plain))
    assert torch.equal(logits(capture_pretrained(second)[0], IDS), ours)
    with pytest.raises(UsageError, match="already quantized") as caught:
        make_plan(second, from_python("trtllm", dtype="bf16", quant="awq"))
    assert str(caught.value.where).endswith("hf_quant_config.json")


def test_factors_of_inputs_are_in_the_graph(tmp_path: Path, folders: Callable[[str], Path]) -> None:
    """pre_quant_scale, as ModelOpt writes it where no norm takes it: the input is multiplied."""
    down = "model.layers.0.mlp.down_proj"
    factor = torch.linspace(0.5, 2.0, 128)
    folder = _copy(folders("W4A16_AWQ"), tmp_path, **{f"{down}.pre_quant_scale": factor})
    program, _ = capture_pretrained(folder)
    name = f"{down}.weight_input_factor"
    assert torch.equal(program.weight(name), factor)
    plain = logits(made("llama", "W4A16_AWQ"), IDS)
    assert not torch.equal(logits(program, IDS), plain)
    write(program, folder, tmp_path / "again")
    assert torch.equal(tensors(tmp_path / "again")[f"{down}.pre_quant_scale"], factor)


def test_the_plan_counts_what_the_folder_holds(folders: Callable[[str], Path]) -> None:
    plan = make_plan(folders("W8A16"), from_python("trtllm", dtype="bf16"))
    assert plan["note"] == "quantized already (modelopt): 14 linears keep their codes"


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"quant_algo": "W4A8_AWQ"}, "'quant_algo' is 'W4A8_AWQ'"),
        ({"quant_algo": None}, "'quant_algo' is missing"),
        ({"kv_cache_quant_algo": "NVFP4"}, "'kv_cache_quant_algo' is 'NVFP4'"),
        ({"has_zero_point": True}, "'has_zero_point' is True"),
    ],
)
def test_settings_that_optc_has_no_form_for(
    tmp_path: Path, folders: Callable[[str], Path], changed: dict[str, Any], why: str
) -> None:
    folder = _copy(folders("FP8"), tmp_path)
    _settings(folder, **changed)
    with pytest.raises(InputError, match="quantization cannot be read") as caught:
        quantized_folder(check_folder(folder))
    assert why in str(caught.value.why)
    assert "hf_quant_config.json" in str(caught.value.where)


def _read(folder: Path) -> None:
    found = quantized_folder(check_folder(folder))
    assert found is not None
    found.layout.read(UP)


@pytest.mark.parametrize(
    ("algorithm", "last", "tensor", "text"),
    [
        ("FP8", "input_scale", None, "missing tensor"),
        ("FP8", "input_scale", torch.ones(3), "expected one number"),
        ("FP8", "weight_scale", torch.zeros(()), "a value that is not a positive number"),
        ("FP8", "weight", torch.zeros(128, 64), "wrong type"),
        (
            "NVFP4",
            "weight_scale",
            torch.ones(128, 3).to(torch.float8_e4m3fn),
            "the scales have the wrong shape",
        ),
        ("NVFP4", "weight_scale_2", None, "missing tensor"),
        ("W4A16_AWQ", "weight_scale", torch.ones(128, 3), "3 groups do not divide 64 columns"),
        ("W4A16_AWQ", "weight_scale", torch.ones(64, 1), "the scales have the wrong shape"),
        ("W4A16_AWQ", "pre_quant_scale", torch.ones(3), "expected [64]"),
        ("W8A16", "weight_scale", torch.ones(127), "the scales have the wrong shape"),
        ("W8A16", "weight", torch.zeros(128, dtype=torch.int8), "expected two axes"),
    ],
)
def test_tensors_that_do_not_fit(
    tmp_path: Path, folders: Callable[[str], Path], algorithm: str, last: str, tensor: Any, text: str
) -> None:
    folder = _copy(folders(algorithm), tmp_path, **{f"{UP}.{last}": tensor})
    with pytest.raises(InputError) as caught:
        _read(folder)
    assert text in f"{caught.value.what} {caught.value.why}"
    assert "up_proj" in f"{caught.value.what} {caught.value.where} {caught.value.why}"


@pytest.mark.parametrize(
    ("tensor", "text"),
    [
        (None, "missing tensor"),
        (torch.ones(2, 1, 1), "expected one number"),
        (torch.tensor(-1.0), "a value that is not a positive number"),
    ],
)
def test_scales_of_a_cache_that_do_not_fit(
    tmp_path: Path, folders: Callable[[str], Path], tensor: Any, text: str
) -> None:
    name = "model.layers.1.self_attn.v_proj.v_scale"
    folder = _copy(folders(""), tmp_path, **{name: tensor})
    with pytest.raises(InputError) as caught:
        capture_pretrained(folder)
    assert name in caught.value.what
    assert text in f"{caught.value.what} {caught.value.why}"


def test_scales_of_a_cache_that_no_attention_has(tmp_path: Path, folders: Callable[[str], Path]) -> None:
    name = "model.layers.7.self_attn.k_proj.k_scale"
    folder = _copy(folders("FP8"), tmp_path, **{name: torch.ones(())})
    with pytest.raises(Exception, match="do not belong to any attention") as caught:
        capture_pretrained(folder)
    assert name in str(caught.value.where)
