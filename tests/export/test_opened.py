"""What was written is opened in its engine before it is published; damage stops the compile."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import make_model
from torch import nn

import optc
from optc import api, opening
from optc.compiler.diagnostics import GateError
from optc.opening import open_written


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8)).eval()


def _compile(model: Any, path: Path, target: str = "onnx-cpu", **options: Any) -> api.CompileResult:
    inputs = (torch.randn(2, 32),) if isinstance(model, nn.Sequential) else None
    return optc.compile(model, target=target, output=path / "out", example_inputs=inputs, **options)


def _damaged(monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None]) -> None:
    """Let `damage` change what was written before it is opened."""

    def opening(directory: Path, *rest: Any) -> Any:
        damage(directory)
        return open_written(directory, *rest)

    monkeypatch.setattr(api, "open_written", opening)


def _scaled(name: str) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        path = directory / name
        (np.frombuffer(path.read_bytes(), dtype=np.float32) * np.float32(1.001)).tofile(path)

    return damage


def _cut(directory: Path) -> None:
    path = directory / "model.onnx"
    path.write_bytes(path.read_bytes()[:100])


def test_figures_are_recorded(tmp_path: Path) -> None:
    result = _compile(_net(), tmp_path)
    opened = result.manifest.opened
    assert opened is not None
    assert opened.opened
    assert opened.engine == "onnxruntime"
    assert opened.relative is not None
    assert opened.relative < 1e-6
    assert opened.limit == 1e-4
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["opened"]["opened"] is True
    assert result.to_dict()["opened"]["engine"] == "onnxruntime"
    assert "opened in onnxruntime" in (tmp_path / "out" / "report.html").read_text()


def test_the_users_limit_widens_that_of_the_file(tmp_path: Path) -> None:
    """Activations are rounded in the last stage as they are in the engine; what is left is the order of sums."""
    opened = _compile(make_model("llama"), tmp_path, quant="rtn", group_size=32, max_relative_error=9).manifest.opened
    assert opened is not None
    assert opening._ROUNDED_TOLERANCE == 0.03
    assert opened.limit == 9
    assert opened.relative is not None
    assert opened.relative < 0.03  # 5e-7 where ONNX Runtime has a product of integers for the CPU
    assert opened.tokens == 11


def test_an_encoder_is_opened(tmp_path: Path) -> None:
    opened = _compile(make_model("bert"), tmp_path).manifest.opened
    assert opened is not None
    assert opened.relative is not None
    assert opened.relative < 1e-5


def test_damaged_weights_stop_the_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _damaged(monkeypatch, _scaled("model.onnx.data"))
    with pytest.raises(GateError, match="computes different numbers from the last stage in onnxruntime") as caught:
        _compile(_net(), tmp_path)
    assert caught.value.exit_code == 5
    assert not list(tmp_path.iterdir()), "nothing is published"


def test_a_file_that_cannot_be_opened_stops_the_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _damaged(monkeypatch, _cut)
    with pytest.raises(GateError, match="the written file cannot be opened by onnx"):
        _compile(_net(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_engine_that_is_not_installed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optc.runtime.sessions.graph_runner", None)
    opened = _compile(_net(), tmp_path).manifest.opened
    assert opened is not None
    assert not opened.opened
    assert opened.why == "ONNX Runtime is not installed"


def test_a_model_folder_is_read_back(example_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = _compile(example_model, tmp_path, "vllm", quant="rtn").manifest.opened
    assert opened is not None
    assert opened.engine == "transformers"
    assert opened.relative is not None
    assert opened.relative < 1e-2
    assert opened.kl is not None

    def damage(directory: Path) -> None:
        from safetensors.torch import load_file, save_file

        path = directory / "model.safetensors"
        tensors = load_file(path)
        name = next(name for name in tensors if name.endswith("weight_scale"))
        save_file({**tensors, name: tensors[name] * 1.5}, path, metadata={"format": "pt"})

    _damaged(monkeypatch, damage)
    with pytest.raises(GateError, match="computes different numbers from the last stage in transformers"):
        _compile(example_model, tmp_path / "second", "vllm", quant="rtn")
