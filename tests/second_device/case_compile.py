"""A compile whose passes run on the second device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from elsewhere import ELSEWHERE, There, second_device
from hf_folders import source

import optc
from optc.compiler.capture.pretrained import capture_pretrained
from optc.compiler.pipeline import pipeline


def test_a_compile_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pass and the gate run there, and the folder is the one that the CPU makes."""
    rows = torch.randint(0, 128, (4, 32), generator=torch.Generator().manual_seed(0))
    options = {"target": "vllm", "quant": "gptq", "calibration": rows}
    model = source("llama")
    captured = capture_pretrained(model)  # outside: torch.export does not know the second device
    monkeypatch.setattr("optc.capturing.capture_pretrained", lambda *_, **__: captured)
    optc.compile(model, output=tmp_path / "here", **options)
    seen: list[bool] = []
    run = pipeline.run_probe

    def watched(*arguments: Any, **named: Any) -> object:
        found = run(*arguments, **named)
        seen.append(isinstance(found.logits[0], There))
        return found

    monkeypatch.setattr(pipeline, "run_probe", watched)
    monkeypatch.setattr("optc.resolving.choose_device", lambda name: ELSEWHERE)
    with second_device():
        optc.compile(model, output=tmp_path / "there", **options)
    assert seen
    assert all(seen)
    for file in (tmp_path / "here").glob("*.safetensors"):
        ours, theirs = (np.frombuffer(path.read_bytes(), np.uint8) for path in (file, tmp_path / "there" / file.name))
        different = float((ours != theirs).mean())
        assert different < 0.05, "sums end in other last bits, and GPTQ carries a code on"
