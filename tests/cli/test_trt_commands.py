"""`optc plan` and `optc compile` for TensorRT on the example model: what is refused, and a folder without a plan."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from once import short_example

from optc.cli.main import cli
from optc.compiler.artifact.folder import verify
from optc.compiler.diagnostics import OptcError


def plan(model: Path, *flags: str) -> str:
    """What a refused plan says."""
    arguments = ["plan", str(model), "--target", "trt", "--trt-runtime", "none", *flags]
    error = CliRunner().invoke(cli, arguments).exception
    assert isinstance(error, OptcError), error
    assert error.exit_code == 4
    return str(error)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--max-seq-len", "100000"), "is beyond the model's context of"),
        (
            ("--quant", "awq", "--asymmetric"),
            "nearest here: --quant awq --bits 4 --symmetric; the same request runs on",
        ),
        (("--quant", "nf4"), "does not take quantization 'nf4'"),
        (("--trt-ops", "basic", "--quant", "awq"), "nearest here: --quant smoothquant"),
        (("--arch", "sm89"), "--arch is for TensorRT for RTX"),
    ],
)
def test_refused(example_model: Path, flags: tuple[str, ...], text: str) -> None:
    assert text in plan(example_model, *flags)


def test_a_folder_without_a_plan(tmp_path: Path) -> None:
    arguments = ["compile", str(short_example(layers=1)), "--target", "trt", "--trt-runtime", "none", "--quant", "rtn"]
    arguments += ["--max-seq-len", "128", "-o", str(tmp_path / "out"), "--json"]
    done = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    manifest = verify(tmp_path / "out")
    engine = json.loads((tmp_path / "out" / "engine.json").read_text())
    assert (manifest.engine, manifest.dtype, manifest.engine_info["plan"]) == ("tensorrt", "float16", None)
    assert manifest.quantization["linears"] == engine["network"]["dequantize"]["INT4"]
    assert 1.0 <= manifest.quantization["ratio_to_ideal"] < 1.02
    assert engine["plan"] is None
    assert engine["cache"]["capacity"] == 128
    assert {"build_plan.py", "run_trt.py", "build.sh", "check.py", "tokenizer.json"} <= {
        entry.path for entry in manifest.files
    }
