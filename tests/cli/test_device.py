"""--device: names, refusals, and a compile whose passes run on a second device."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from artifacts import make_artifact
from conftest import EXAMPLE

from optc.cli.main import main
from optc.compiler.diagnostics import TargetError, UsageError
from optc.compiler.ir.devices import choose_device

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


def test_eval_bench_and_train_without_cuda(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before anything is loaded; an artifact for the CPU is no bench of a GPU."""
    text = EXAMPLE.parent / "book.txt"
    artifact, output = tmp_path / "artifact", tmp_path / "out"
    make_artifact(artifact, device="cpu")
    commands = [
        ("eval", artifact, "--text", text),
        ("bench", artifact),
        ("train", "--recipe", "finetune", "--model", EXAMPLE, "--text", text, "-o", output),
    ]
    cuda(monkeypatch, 0)
    for command in commands:
        assert exit_code(*command, "--device", "gpu") == 2, command
        capsys.readouterr()
        assert exit_code(*command, "--device", "cuda", "--json") == 4, command
        said = json.loads(capsys.readouterr().out)
        assert said["what"] == "--device cuda needs a CUDA device, and there is none here"
    cuda(monkeypatch, 2)
    assert exit_code("bench", artifact, "--device", "cuda:1", "--json") == 4
    said = json.loads(capsys.readouterr().out)
    assert (said["what"], said["cause"]) == (
        "the artifact does not run on cuda:1",
        "its engine, onnx, runs on the CPU",
    )
    assert not output.exists()
