"""What --target onnx-cuda writes, in ONNX Runtime's CUDA provider: the program's numbers, and where nodes run."""

from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import DECODERS
from onnx_cuda_files import compare, written
from rewrites import stirred

import optc

ort = pytest.importorskip("onnxruntime")
PROVIDER = "CUDAExecutionProvider"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or PROVIDER not in ort.get_available_providers(),
        reason="needs a CUDA device and onnxruntime-gpu",
    ),
]
QUANTIZED: dict[str, dict[str, Any]] = {
    "4 bits": {"quant": "rtn", "group_size": 32},
    "4 bits with zero points": {"quant": "rtn", "group_size": 16, "symmetric": False},
    "8 bits": {"quant": "rtn", "bits": 8, "group_size": 32},
    "head in 4 bits": {"quant": "rtn", "group_size": 32, "head_bits": 4},
}


CASES = [*((name, "fp16") for name in DECODERS), *((name, "bf16") for name in DECODERS if name != "mixtral")]
"""In bfloat16 a router of random weights chooses other experts for a token in fifty, here and there."""


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_families(name: str, dtype: str, tmp_path: Path) -> None:
    _compare(name, tmp_path, dtype=dtype)


@pytest.mark.parametrize("options", QUANTIZED)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_quantized(name: str, options: str, tmp_path: Path) -> None:
    _compare(name, tmp_path, dtype="fp16", **QUANTIZED[options])


def _compare(name: str, folder: Path, **options: Any) -> None:
    from optc.runtime.sessions.ort_cuda import OrtCudaSession

    program, _ = written(name, folder, **options)
    session = OrtCudaSession(folder / "model.onnx", program.contract)
    compare(session, program)
    session.close()


def test_layers_run_on_the_gpu(tmp_path: Path) -> None:
    """ONNX Runtime moves sizes to the CPU, and what it has no kernel for: no product, norm or attention may be there."""
    program, _ = written("llama", tmp_path, dtype="fp16", quant="rtn", group_size=32)
    options = ort.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    session = ort.InferenceSession(str(tmp_path / "model.onnx"), options, providers=[PROVIDER, "CPUExecutionProvider"])
    feed = {"input_ids": [[5, 6, 7]], "attention_mask": [[1, 1, 1]]}
    values = {name: ort.OrtValue.ortvalue_from_numpy(torch.tensor(rows).numpy()) for name, rows in feed.items()}
    for spec in program.contract.inputs:
        if spec.name.startswith("past_key_values"):
            cache = torch.zeros((1, int(spec.dims[1]), 0, int(spec.dims[3])), dtype=torch.float16)
            values[spec.name] = ort.OrtValue.ortvalue_from_numpy(cache.numpy())
    session.run_with_ort_values(["logits"], values)
    events = json.loads(Path(session.end_profiling()).read_text())
    places: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for event in events:
        if event.get("cat") == "Node" and "op_name" in event["args"]:
            places[event["args"]["provider"]][event["args"]["op_name"]] += 1
    heavy = {"MatMulNBits", "MatMul", "GroupQueryAttention", "RMSNormalization", "SkipSimplifiedLayerNormalization"}
    assert not heavy & set(places["CPUExecutionProvider"]), places["CPUExecutionProvider"]
    assert heavy & set(places[PROVIDER])


def test_the_written_file_is_opened_on_the_gpu(tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        made = optc.compile(stirred("llama", dtype, 1), target="onnx-cuda", output=tmp_path / str(dtype))
        assert made.manifest.opened.opened
        assert made.manifest.opened.why == ""
