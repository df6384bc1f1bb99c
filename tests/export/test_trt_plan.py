"""Plans that TensorRT for RTX builds here, without a GPU: what is recorded of them, and how two builds differ."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trt_driver
from rewrites import stirred

from optc.compiler.artifact.folder import finish, verify
from optc.compiler.artifact.manifest import Manifest, ProgramEntry, Source
from optc.compiler.diagnostics import TargetError
from optc.compiler.ir.contract import Contract
from optc.compiler.ir.program import Program
from optc.compiler.ir.verification import VerificationError
from optc.compiler.target.target import ExportResult
from optc.exporters.trt import build_plan
from optc.exporters.trt.builders import Choice
from optc.exporters.trt.export import build_plan as build

pytestmark = pytest.mark.skipif(
    not any(importlib.util.find_spec(name) for name in build_plan.PACKAGES["rtx"]),
    reason="TensorRT for RTX is not installed: pip install 'optc[trt]'",
)


@functools.cache
def last_stage(name: str, dtype: torch.dtype, quant: str | None) -> Program:
    kinds = {torch.float16: "fp16", torch.float32: "fp32"}
    return trt_driver.stages(stirred(name, dtype), trt_driver.options(dtype=kinds[dtype], quant=quant))[1]


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ExportResult]:
    """A tiny Llama in float16 with 4-bit weights."""
    folder = tmp_path_factory.mktemp("int4")
    chosen = trt_driver.options(dtype="fp16", quant="rtn", trt_runtime="rtx", arch="sm89,sm120")
    return folder, trt_driver.export(last_stage("llama", torch.float16, "rtn"), folder, chosen)


def facts(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "engine.json").read_text()))


def test_what_is_recorded(int4: tuple[Path, ExportResult]) -> None:
    folder, result = int4
    plan, engine = (folder / "model.plan").read_bytes(), facts(folder)
    assert engine["plan_sha256"] == hashlib.sha256(plan).hexdigest() == result.info["plan_sha256"]
    assert engine["plan_bytes"] == len(plan) == result.info["plan_bytes"]
    assert engine["runtime"] == "tensorrt_rtx"
    assert engine["compute_capabilities"] == ["sm89", "sm120"]
    assert engine["attention_kernels"] == "dedicated kernels"
    assert engine["network_found"]["dequantize"] == {"INT4": 14}
    assert engine["network_found"] == engine["network"]
    assert result.engine.name == "tensorrt"
    assert result.needs == {
        "tensorrt_rtx": f"=={engine['runtime_version']}",
        "compute_capabilities": ["sm89", "sm120"],
    }
    for name in ("input_ids", "positions", "past_key_values.1.value", "present.1.key", "logits"):
        assert name.encode() in plan


def test_two_builds_are_equal_but_for_the_order_of_a_table(int4: tuple[Path, ExportResult], tmp_path: Path) -> None:
    """The graph byte for byte; of the plan, TensorRT for RTX writes a few entries in an order of its own."""
    folder, _ = int4
    chosen = trt_driver.options(dtype="fp16", quant="rtn", trt_runtime="rtx", arch="sm89,sm120")
    trt_driver.export(last_stage("llama", torch.float16, "rtn"), tmp_path, chosen)
    for name in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes(), name
    assert {**facts(tmp_path), "plan_sha256": ""} == {**facts(folder), "plan_sha256": ""}
    first, second = (np.fromfile(place / "model.plan", np.uint8) for place in (folder, tmp_path))
    assert len(first) == len(second)
    differing = np.flatnonzero(first != second)
    assert len(differing) <= len(first) // 500
    head = len(first) // 10  # the tables: one near the start, one behind the weights of the engine
    middle = differing[differing > head]
    assert middle.size == 0 or np.ptp(middle) < 20_000


@pytest.mark.parametrize(
    ("name", "dtype", "quant", "ops", "found"),
    [
        ("llama", torch.float32, None, "fused", {"attention": 2, "kv_updates": 4}),
        ("gemma2", torch.float16, None, "fused", {"attention": 0, "softmax": 2, "kv_updates": 4}),
        ("llama", torch.float16, None, "basic", {"attention": 0, "softmax": 2, "scatter": 4}),
        ("llama", torch.float16, "smoothquant", "fused", {"quantize": 8, "dequantize": {"INT8": 22}}),
    ],
    ids=["fp32", "softcap", "basic", "w8a8"],
)
def test_others_are_built(
    name: str, dtype: torch.dtype, quant: str | None, ops: str, found: dict[str, Any], tmp_path: Path
) -> None:
    kind = "fp32" if dtype is torch.float32 else "fp16"
    chosen = trt_driver.options(dtype=kind, quant=quant, trt_ops=ops, trt_runtime="rtx")
    result = trt_driver.export(last_stage(name, dtype, quant), tmp_path, chosen)
    assert found.items() <= result.info["network_found"].items()
    assert result.info["compute_capabilities"] == "portable"
    kernels = {"fp32": "decomposed", "fp16": "dedicated kernels"}[kind]
    assert result.info["attention_kernels"] == (kernels if found.get("attention") != 0 else None)


def _copied(int4: tuple[Path, ExportResult], tmp_path: Path) -> Path:
    """A folder without a plan."""
    shutil.copytree(int4[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.plan").unlink()
    return tmp_path


def test_a_network_that_is_not_the_programs_stops_the_build(int4: tuple[Path, ExportResult], tmp_path: Path) -> None:
    folder = _copied(int4, tmp_path)
    engine = facts(folder)
    engine["network"]["dequantize"] = {"INT4": 15}
    (folder / "engine.json").write_text(json.dumps(engine))
    with pytest.raises(VerificationError, match="the parsed network is not the program") as caught:
        build(folder, Choice("fused", "rtx"))
    assert "dequantize: {'INT4': 14}, the program has {'INT4': 15}" in str(caught.value)
    assert not (folder / "model.plan").exists()


def test_an_architecture_that_the_runtime_lacks(int4: tuple[Path, ExportResult], tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="does not support the architecture sm90"):
        build(_copied(int4, tmp_path), Choice("fused", "rtx", ("sm90",)))


def test_a_builder_that_is_killed(int4: tuple[Path, ExportResult], tmp_path: Path) -> None:
    folder = _copied(int4, tmp_path)
    (folder / "build_plan.py").write_text("import os\nos.kill(os.getpid(), 9)\n")
    from optc.compiler.diagnostics import ResourceError

    with pytest.raises(ResourceError, match="ended by signal 9"):
        build(folder, Choice("fused", "rtx"))


def test_a_plan_built_later_is_sealed_into_the_manifest(int4: tuple[Path, ExportResult], tmp_path: Path) -> None:
    """As on a device: by the folder's own script, without optc."""
    folder = _copied(int4, tmp_path)
    engine = facts(folder)
    blank = dict.fromkeys(("runtime", "runtime_version", "plan", "plan_sha256", "plan_bytes"))
    (folder / "engine.json").write_text(json.dumps({**engine, **blank}))
    finish(folder, _manifest())
    command = [
        sys.executable,
        "-I",
        str(folder / "build_plan.py"),
        "--runtime",
        "rtx",
        "--arch",
        "sm89,sm120",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("model.plan: ")
    manifest = verify(folder)
    written = hashlib.sha256((folder / "model.plan").read_bytes()).hexdigest()
    assert manifest.engine_info["plan_sha256"] == facts(folder)["plan_sha256"] == written
    assert manifest.needs["tensorrt_rtx"] == f"=={engine['runtime_version']}"
    assert "tensorrt" not in manifest.needs


def _manifest() -> Manifest:
    source = Source(path="", config_sha256="", weights_sha256="", parameters=0, dtype="")
    program = ProgramEntry(contract=Contract(kind="decoder", inputs=(), outputs=()), engine_info={"plan": None})
    return Manifest(
        optc_version="0",
        created="",
        target="trt",
        engine="tensorrt",
        device="cuda",
        needs={"machine": "x86_64", "tensorrt": ">=8.6"},
        dtype="float16",
        source=source,
        passes=(),
        weight_bytes=0,
        quantization={},
        seconds={},
        programs={"model": program},
    )
