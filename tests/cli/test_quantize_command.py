"""`optc quantize`: a compile to a checkpoint, with the flags of `optc compile` that are not about an engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import optc
from families import make_model
from html_pages import Page
from transformers import AutoModelForCausalLM

from optc.compiler.artifact.folder import verify

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "llama"
    make_model("llama").save_pretrained(folder)
    return folder


def test_writes_a_checkpoint(model: Path, tmp_path: Path, capsys: Capture) -> None:
    """8-bit round to nearest: transformers loads the folder, and its logits are nearly the model's."""
    flags = ("--quant", "rtn", "--bits", 8, "--group-size", 32, "-o", tmp_path / "out", "--json")
    assert optc("quantize", model, *flags) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert found["target"] == "vllm"
    assert (found["quantization"]["bits"], found["quantization"]["group_size"]) == ([8], [32])
    assert found["quantization"]["ratio_to_ideal"] < 1.1
    assert verify(tmp_path / "out").target == "vllm"
    assert "quantization" in Page((tmp_path / "out" / "report.html").read_text()).texts
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        ours, theirs = (item(tokens).logits.log_softmax(-1) for item in (loaded, make_model("llama")))
    kl = float((theirs.exp() * (theirs - ours)).sum(-1).mean())
    assert 0 < kl < 0.01


def test_refuses(model: Path, tmp_path: Path, capsys: Capture) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("target: onnx-cpu\nquant: rtn\n")
    out = ("-o", tmp_path / "out")
    cases: list[tuple[int, str, tuple[object, ...]]] = [
        (2, "no model given", ("--quant", "rtn", *out)),
        (2, "no quant given", (model, *out)),
        (2, "no output given", (model, "--quant", "rtn")),
        (2, "No such option '--target'", (model, "--quant", "rtn", "--target", "onnx-cpu", *out)),
        (2, "No such option '--kv-cache'", (model, "--quant", "rtn", "--kv-cache", "paged", *out)),
        (2, "the recipe is for target 'onnx-cpu'", (model, "--recipe", recipe, *out)),
        (2, "unknown quantization 'rtm'", (model, "--quant", "rtm", *out)),
    ]
    for code, message, args in cases:
        assert optc("quantize", *args) == code, message
        printed, err = capsys.readouterr()
        assert message in err
        assert printed == ""
    assert not (tmp_path / "out").exists()


def test_recipe_for_the_same_target(model: Path, tmp_path: Path, capsys: Capture) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"target: vllm\nquant: rtn\nbits: 4\noutput: {tmp_path / 'out'}\nmodel: {model}\nmax-kl: 5\nmin-top1: 0\n"
    )
    assert optc("quantize", "--recipe", recipe, "--json") == 0
    assert json.loads(capsys.readouterr().out)["quantization"]["bits"] == [4]
