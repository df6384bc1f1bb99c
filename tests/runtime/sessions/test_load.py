"""What is refused before an engine sees a file, and what loading does not need."""

from __future__ import annotations

import builtins
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from artifacts import make_artifact, make_manifest

from optc.compiler.diagnostics import ArtifactError, InputError, OptcError, TargetError, UsageError
from optc.compiler.ir.contract import Contract, KVCache
from optc.runtime.sessions.load import load


def _contract(**changes: Any) -> Contract:
    return msgspec.structs.replace(make_manifest().contract, **{"kv_cache": KVCache(kind="linear"), **changes})


@pytest.mark.parametrize(
    ("changes", "options", "error", "message"),
    [
        ({"contract": _contract(kind="encoder")}, {}, TargetError, "kind 'encoder', which does not generate"),
        ({"contract": _contract(kv_cache=KVCache())}, {}, ArtifactError, "the ONNX model is damaged or not trusted"),
        ({}, {"threads": 0}, UsageError, "threads 0 is out of range"),
        ({}, {"num_blocks": 8}, UsageError, "kv-blocks has no effect here"),
        ({}, {}, ArtifactError, "the ONNX model is damaged or not trusted"),
        ({"engine_info": {}}, {}, ArtifactError, "what optc does not write"),
        ({"engine_info": {"model": "../model.onnx"}}, {}, ArtifactError, "the manifest does not list"),
    ],
)
def test_refused_before_the_engine(
    tmp_path: Path, changes: dict[str, Any], options: dict[str, int], error: type[OptcError], message: str
) -> None:
    make_artifact(tmp_path / "artifact", **{"contract": _contract(), **changes})
    with pytest.raises(error, match=message):
        load(tmp_path / "artifact", **options)


def test_every_file_is_verified_first(tmp_path: Path) -> None:
    make_artifact(tmp_path / "artifact", contract=_contract())
    (tmp_path / "artifact" / "ir" / "00-capture.txt").write_text("%1")
    with pytest.raises(ArtifactError, match=r"'ir/00-capture.txt' was changed"):
        load(tmp_path / "artifact")
    with pytest.raises(InputError, match="the artifact does not exist"):
        load(tmp_path / "absent")


def test_missing_engine_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_artifact(tmp_path / "artifact", contract=_contract())
    importing = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "onnxruntime":
            raise ModuleNotFoundError("No module named 'onnxruntime'")
        return importing(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.delitem(sys.modules, "optc.runtime.sessions.ort", raising=False)
    monkeypatch.setattr("optc.runtime.sessions.onnx_artifact.check_onnx", lambda folder, name: None)
    with pytest.raises(TargetError, match="ONNX Runtime is not installed") as caught:
        load(tmp_path / "artifact")
    assert caught.value.remedy == 'pip install "optc[onnx]"'


def test_onnx_artifacts_run_without_torch() -> None:
    code = """
import sys
import optc.cli.main, optc.cli.run, optc.cli.bench, optc.runtime.sessions.load, optc.runtime.sessions.ort
heavy = {"torch", "transformers", "sympy"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else 0)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
