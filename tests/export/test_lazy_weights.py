"""A model whose weights stay in its files compiles to the same artifact as one in memory."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from hf_folders import source

import optc
from optc.compiler.capture import pretrained
from optc.compiler.ir import stored_weights

TOKENS = torch.randint(3, 128, (8, 64), generator=torch.Generator().manual_seed(0))
NOT_COMPARED = {"manifest.json", "report.html"}  # they hold times


def _compiled(folder: Path, model: Path, target: str, quant: str) -> dict[str, str]:
    own = {} if quant in ("smoothquant", "fp8") else {"group_size": 32}
    optc.compile(model, target=target, output=folder, quant=quant, calibration=TOKENS, max_kl=1e9, min_top1=0.0, **own)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in NOT_COMPARED]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(
    ("family", "layers", "target", "quant"),
    [
        ("llama", 1, "onnx-cpu", "best"),
        ("gemma2", 2, "onnx-cpu", "awq"),
        ("mixtral", 1, "onnx-cpu", "gptq"),
        ("gpt2", 1, "onnx-cpu", "rtn"),
        ("llama", 1, "onnx-cpu", "smoothquant"),
        ("llama", 2, "vllm", "awq+gptq"),
        ("phi3", 1, "vllm", "fp8"),
    ],
)
def test_same_artifact(
    family: str, layers: int, target: str, quant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Methods that go from layer to layer have two: what one leaves behind the next one reads."""
    model = source(family, layers)
    expected = _compiled(tmp_path / "resident", model, target, quant)
    monkeypatch.setattr(pretrained, "RESIDENT_BYTES", 0)
    monkeypatch.setattr(stored_weights, "_SPILLED_BYTES", 0)
    assert _compiled(tmp_path / "lazy", model, target, quant) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lazy", "resident"], "nothing is left beside"
