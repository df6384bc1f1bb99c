"""SIGKILL while `optc compile` replaces an artifact: the old one stands, whole, or the new one does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hf_folders import source

import optc
from optc.compiler.artifact.folder import verify


@pytest.mark.slow
def test_kill_leaves_old_artifact_or_new(tmp_path: Path) -> None:
    model, output = source("llama"), tmp_path / "artifact"
    old = optc.compile(model, target="onnx-cpu", output=output).manifest.self_sha256
    command = [sys.executable, "-m", "optc", "compile", str(model), "--target", "onnx-cpu", "--quant", "rtn"]
    command += ["--group-size", "32", "-o", str(output), "--force"]
    begin = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    whole = time.perf_counter() - begin
    new = verify(output).self_sha256
    assert new != old
    for share in (0.3, 0.7, 0.9, 0.97):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(whole * share)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        verify(output)
    subprocess.run(command, check=True, capture_output=True)
    verify(output)
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]  # what the kills left is gone
