"""build_plan.py's errors and choices, over stand-ins for TensorRT where none is needed to show them."""

from __future__ import annotations

import ast
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from optc.exporters.trt import build_plan


def test_it_needs_nothing_but_the_standard_library() -> None:
    """And parses as Python 3.8."""
    tree = ast.parse(Path(build_plan.__file__).read_text(), feature_version=(3, 8))
    found = set()
    for item in ast.walk(tree):
        if isinstance(item, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in item.names}
        elif isinstance(item, ast.ImportFrom):
            found.add((item.module or "").partition(".")[0])
    assert found <= set(sys.stdlib_module_names) | {"__future__"}


def test_no_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "engine.json").write_text(json.dumps({"format": 1, "ops": "fused"}))
    assert build_plan.main([str(tmp_path), "--json"]) == 4
    printed = capsys.readouterr()
    said = json.loads(printed.out)
    assert said["error"] == "TensorRT is not installed: no package tensorrt nor tensorrt_rtx"
    assert 'pip install "optc[trt]"' in said["remedy"]
    assert printed.err.startswith("error: TensorRT is not installed")


def test_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build_plan.main([str(tmp_path / "none")]) == 3
    assert "no readable engine.json" in capsys.readouterr().err
    (tmp_path / "engine.json").write_text('{"format": 2}')
    assert build_plan.main([str(tmp_path)]) == 3
    assert "engine.json has a different format" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("version", "ops", "taken"),
    [
        ("8.6.0", "fused", False),
        ("8.6.0", "basic", True),
        ("10.13.2", "fused", False),
        ("10.15.1", "fused", True),
        ("11.0.0", "fused", True),
        ("8.5.3", "basic", False),
    ],
)
def test_versions(version: str, ops: str, taken: bool) -> None:
    trt = types.SimpleNamespace(__version__=version)
    if taken:
        build_plan.check_version(trt, "tensorrt", ops)
        return
    with pytest.raises(build_plan.BuildError, match=f"TensorRT {version} does not parse the op set '{ops}'") as caught:
        build_plan.check_version(trt, "tensorrt", ops)
    assert caught.value.code == 4


class _Config:
    """Notes what is set."""

    def __init__(self) -> None:
        self.flags: list[str] = []
        self.cleared: list[str] = []
        self.tactics = 0

    def set_flag(self, flag: str) -> None:
        self.flags.append(flag)

    def clear_flag(self, flag: str) -> None:
        self.cleared.append(flag)

    def set_tactic_sources(self, mask: int) -> None:
        self.tactics = mask


def _tensorrt8() -> Any:
    names = ("TF32", "FP16", "INT8", "PREFER_PRECISION_CONSTRAINTS")
    return types.SimpleNamespace(
        __version__="8.6.0",
        float32="FLOAT",
        BuilderFlag=types.SimpleNamespace(**{name: name for name in names}),
        TacticSource=types.SimpleNamespace(EDGE_MASK_CONVOLUTIONS=3, JIT_CONVOLUTIONS=4),
    )


class _Layer:
    def __init__(self, kind: str, dtype: str) -> None:
        self.type, self._dtype, self.precision = f"LayerType.{kind}", dtype, ""

    def get_output(self, _: int) -> Any:
        return types.SimpleNamespace(dtype=self._dtype)

    def set_output_type(self, _: int, dtype: str) -> None:
        self.precision += f" {dtype}"


@pytest.mark.parametrize(("dtype", "quantize"), [("fp16", 0), ("fp16", 8), ("fp32", 0)])
def test_precision_of_tensorrt_8(dtype: str, quantize: int) -> None:
    """float32 stays float32; half precision and int8 are allowed where the graph has them."""
    rows = [_Layer("REDUCE", "FLOAT"), _Layer("ELEMENTWISE", "HALF"), _Layer("MATRIX_MULTIPLY", "FLOAT")]
    network = types.SimpleNamespace(num_layers=3, get_layer=rows.__getitem__)
    facts = {"dtype": dtype, "network": {"quantize": quantize}}
    config = _Config()
    build_plan.set_precision(_tensorrt8(), network, config, facts, False)
    assert config.cleared == ["TF32"]
    wanted = ["FP16", "PREFER_PRECISION_CONSTRAINTS"] * (dtype == "fp16") + ["INT8"] * bool(quantize)
    assert config.flags == wanted
    assert config.tactics == (1 << 3) + (1 << 4)
    assert [row.precision for row in rows] == (["FLOAT FLOAT", "", ""] if dtype == "fp16" else ["", "", ""])


def test_architectures_are_for_rtx() -> None:
    with pytest.raises(build_plan.BuildError, match="builds for the GPU that is present"):
        build_plan.set_architectures(_tensorrt8(), _Config(), "tensorrt", ["sm80"])


def test_a_profile_that_is_refused() -> None:
    profile = types.SimpleNamespace(set_shape=lambda name, *shapes: None)
    builder = types.SimpleNamespace(create_optimization_profile=lambda: profile)
    network = types.SimpleNamespace(num_inputs=1, get_input=lambda _: types.SimpleNamespace(name="positions"))
    config = types.SimpleNamespace(add_optimization_profile=lambda _: -1)
    row = {"name": "decode", "batch": [1, 1, 4], "tokens": [1, 1, 1]}
    facts = {"profiles": [row], "inputs": {"positions": {"dims": ["batch"]}}}
    with pytest.raises(build_plan.BuildError, match="does not take the profile 'decode'"):
        build_plan.add_profiles(builder, network, config, facts)


def test_a_plan_that_does_not_name_its_tensors(tmp_path: Path) -> None:
    (tmp_path / "plan").write_bytes(b"...input_ids...")
    with pytest.raises(build_plan.BuildError, match="does not name its tensors") as caught:
        build_plan.check_names(str(tmp_path / "plan"), {"inputs": {"input_ids": 0}, "outputs": {"logits": 0}})
    assert (caught.value.code, caught.value.why) == (7, "logits")
