"""--save-recipe: what was asked for, as a recipe that gives the same request."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from command_line import optc
from once import short_example

from optc.cli.request_flags import merge_recipe, request_of
from optc.compiler.diagnostics import UsageError
from optc.request import from_python
from optc.saved_recipes import recipe_of, write_recipe


def test_it_is_read_back_as_the_same_request(tmp_path: Path) -> None:
    request = from_python(
        "onnx-cpu",
        quant="gptq",
        bits=4,
        group_size=64,
        symmetric=False,
        ignore=["*.down_proj.*", "lm_head"],
        head_bits=4,
        calibration="book.txt",
        passes=["fuse-norm", {"quantize-rtn": {"bits": 3}}],
        max_kl=0.5,
        output="out/fiction",
        force=True,
        save_recipe=tmp_path / "saved.yaml",
    )
    write_recipe(tmp_path / "saved.yaml", "examples/fiction-3m", request)
    assert [path.name for path in tmp_path.iterdir()] == ["saved.yaml"]
    merged = merge_recipe({"recipe": tmp_path / "saved.yaml"})
    assert merged["model"].value == "examples/fiction-3m"
    again = request_of(merged, merged["target"].value)
    assert recipe_of("examples/fiction-3m", again) == recipe_of("examples/fiction-3m", request)
    assert (again.quantization, again.options, again.gate) == (request.quantization, request.options, request.gate)
    assert not again.run.force


def test_only_what_differs_from_the_defaults_is_in_it() -> None:
    request = from_python("vllm", output="out/folder", bits=4, quant="rtn")
    expected = {"model": "m", "target": "vllm", "quant": "rtn", "bits": 4, "output": "out/folder"}
    assert recipe_of("m", request) == expected


def test_what_has_no_name_is_refused_before_the_compile(tmp_path: Path) -> None:
    plain = from_python("onnx-cpu", output=tmp_path / "out")
    with pytest.raises(UsageError, match="a recipe cannot name a model in memory"):
        recipe_of(torch.nn.Linear(2, 2), plain)
    tokens = from_python("onnx-cpu", quant="gptq", calibration=torch.ones(1, 8, dtype=torch.int64))
    with pytest.raises(UsageError, match="a recipe cannot name a Tensor"):
        recipe_of("m", tokens)


def test_a_compile_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And a file that is there is not replaced without --force, before any work is done."""
    saved = tmp_path / "sub" / "saved.yaml"
    model = short_example(layers=1)
    arguments = ("compile", model, "--target", "vllm", "-o", tmp_path / "out", "--save-recipe", saved)
    assert optc(*arguments) == 0
    found = yaml.safe_load(saved.read_text())
    assert found == {"model": str(model), "target": "vllm", "output": str(tmp_path / "out")}
    assert optc("compile", "--recipe", saved, "--save-recipe", saved, "-o", tmp_path / "other") == 3
    assert "the recipe exists already" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
