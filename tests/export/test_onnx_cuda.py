"""The target onnx-cuda where there is no GPU: its graphs in ONNX Runtime's CPU provider, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from chosen import chosen
from onnx_cuda_files import compare, written
from rewrites import stirred

import optc
from optc.compiler.artifact.engines import ONNX_CUDA
from optc.compiler.artifact.genai_config import FILE_NAME, check_genai_config
from optc.compiler.diagnostics import TargetError
from optc.runtime.sessions.ort import OrtSession, has_cuda
from optc.runtime.sessions.ort_cuda import OrtCudaSession


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"quant": "rtn", "group_size": 16}),
        ("qwen2", {"quant": "rtn", "bits": 8, "group_size": 16, "symmetric": False, "head_bits": 16}),
        ("gemma2", {}),
    ],
)
def test_graphs_compute_the_program(name: str, options: dict[str, object], tmp_path: Path) -> None:
    program, result = written(name, tmp_path, dtype="fp16", **options)
    assert result.engine is ONNX_CUDA
    compare(OrtSession(tmp_path / "model.onnx", program.contract), program)
    config = json.loads((tmp_path / FILE_NAME).read_text())
    assert config["model"]["decoder"]["session_options"]["provider_options"] == [{"cuda": {}}]
    check_genai_config(tmp_path, "model.onnx")


@pytest.mark.skipif(has_cuda(), reason="this ONNX Runtime has the CUDA provider")
def test_a_host_without_the_provider_is_told(tmp_path: Path) -> None:
    program, result = written("llama", tmp_path, 1, dtype="fp16")
    assert result.needs == {"onnxruntime-gpu": ">=1.31", "cuda_driver": ">=12.0"}
    with pytest.raises(TargetError, match="CUDA provider") as refused:
        OrtCudaSession(tmp_path / "model.onnx", program.contract)
    assert "has AzureExecutionProvider" in str(refused.value.why) or "CPUExecutionProvider" in str(refused.value.why)
    assert "onnxruntime-gpu" in str(refused.value.remedy)


def test_bfloat16_is_not_opened_without_a_gpu(tmp_path: Path) -> None:
    """ONNX Runtime has no kernels for it on the CPU: the record says so, and the artifact is written."""
    program = stirred("llama", torch.bfloat16, 1)
    made = optc.compile(program, target="onnx-cuda", dtype="bf16", output=tmp_path / "out")
    if not has_cuda():
        assert not made.manifest.opened.opened
        assert "bfloat16" in made.manifest.opened.why


def test_a_program_in_float32_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="no GroupQueryAttention in fp32"):
        optc.compile(stirred("llama", layers=1), target="onnx-cuda", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "fp32"}, "GroupQueryAttention"),
        ({"quant": "rtn", "bits": 3}, "4 and 8 bits"),
        ({"quant": "smoothquant"}, "multiplies no codes"),
    ],
)
def test_what_the_provider_lacks_is_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(TargetError, match="onnx-cuda") as refused:
        chosen("onnx-cuda", **options)
    assert said in str(refused.value.why)
