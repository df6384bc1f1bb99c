"""--device: names, refusals, and a compile whose passes run on a second device."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import EXAMPLE
from elsewhere import ELSEWHERE, There, second_device

import optc
from optc.cli.main import main
from optc.compiler.capture.pretrained import capture_pretrained
from optc.compiler.diagnostics import TargetError, UsageError
from optc.compiler.ir.devices import choose_device
from optc.compiler.pipeline import pipeline

Capture = pytest.CaptureFixture[str]


def exit_code(*args: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(arg) for arg in args])
    return int(caught.value.code or 0)


def cuda(patch: pytest.MonkeyPatch, count: int) -> None:
    patch.setattr(torch.cuda, "is_available", lambda: count > 0)
    patch.setattr(torch.cuda, "device_count", lambda: count)
    patch.setattr(torch.cuda, "current_device", lambda: 1)


def test_names(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda(monkeypatch, 0)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    cuda(monkeypatch, 2)
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda", 1)
    assert choose_device("cuda:0") == torch.device("cuda", 0)
    for name in ("gpu", "cuda:", "cuda:x", "cpu:0", "cuda:-1", ""):
        with pytest.raises(UsageError, match="use cpu, cuda, cuda:N or auto"):
            choose_device(name)
    with pytest.raises(TargetError) as caught:
        choose_device("cuda:2")
    assert caught.value.why == "this machine has 2 CUDA device(s), counted from 0"
    assert caught.value.remedy == "use cuda:1 or less"


@pytest.mark.parametrize("command", [("compile", "--target", "vllm"), ("quantize", "--quant", "rtn")])
def test_cuda_without_cuda(
    command: tuple[str, ...], tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda(monkeypatch, 0)
    name, *flags = command
    assert exit_code(name, EXAMPLE, *flags, "--device", "cuda", "-o", tmp_path / "out", "--json") == 4
    said = json.loads(capsys.readouterr().out)
    assert said["what"] == "--device cuda needs a CUDA device, and there is none here"
    assert said["remedy"].startswith("use --device cpu")
    assert exit_code(name, EXAMPLE, *flags, "--device", "gpu", "-o", tmp_path / "out", "--json") == 2
    said = json.loads(capsys.readouterr().out)
    assert (said["what"], said["remedy"]) == ("'device' cannot be 'gpu'", "give cpu, cuda, cuda:N or auto")
    assert not list(tmp_path.iterdir())


def test_a_compile_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pass and the gate run there, the folder is the one that the CPU makes, and a rerun goes on there."""
    options = {"target": "vllm", "quant": "gptq", "calibration_samples": 4, "calibration_seq_len": 32}
    captured = capture_pretrained(EXAMPLE)  # outside: torch.export does not know the second device
    monkeypatch.setattr("optc.capturing.capture_pretrained", lambda *_, **__: captured)
    optc.compile(EXAMPLE, output=tmp_path / "here", **options)
    seen: list[bool] = []
    run = pipeline.run_probe

    def watched(*arguments: object) -> object:
        found = run(*arguments)
        seen.append(isinstance(found.logits[0], There))
        return found

    monkeypatch.setattr(pipeline, "run_probe", watched)
    monkeypatch.setattr("optc.resolving.choose_device", lambda name: ELSEWHERE)
    with second_device():
        for name in ("first", "again"):
            optc.compile(EXAMPLE, output=tmp_path / name, work_dir=tmp_path / "work", **options)
    assert seen
    assert all(seen)
    for name in ("first", "again"):
        for file in (tmp_path / "here").glob("*.safetensors"):
            ours, theirs = (
                np.frombuffer(path.read_bytes(), np.uint8) for path in (file, tmp_path / name / file.name)
            )
            different = float((ours != theirs).mean())
            assert different < 0.05, "sums end in other last bits, and GPTQ carries a code on"
