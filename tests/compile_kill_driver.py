"""Replaces an artifact by `optc compile`, killed at some shares of the time that it takes: prints `self_sha256` of the
manifests before and after the first replacement that ended.

Arguments: model folder, output folder, shares. The commands run in forks, so that torch is imported once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

torch.set_num_threads(1)

# Imported once, not in each child; no tensor is touched before the forks, which threads would not survive.
import onnxruntime  # noqa: E402, F401
import transformers.models.auto.modeling_auto  # noqa: E402
import transformers.models.llama.modeling_llama  # noqa: E402, F401

from optc.cli.main import main as optc  # noqa: E402
from optc.compiler.artifact.folder import verify  # noqa: E402


def start(model: Path, output: Path, *flags: str) -> int:
    """The process id of `optc compile` in a fork."""
    pid = os.fork()
    if pid:
        return pid
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    code = 1
    try:
        optc(["compile", str(model), "--target", "onnx-cpu", "-o", str(output), "--force", *flags])
    except SystemExit as done:
        code = int(done.code or 0)
    finally:
        os._exit(code)


def finish(pid: int) -> None:
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == 0, f"the command ended with {status}"


def main() -> None:
    model, output = map(Path, sys.argv[1:3])
    quantized = ("--quant", "rtn", "--group-size", "32")
    finish(start(model, output))
    manifests = [verify(output).self_sha256]
    begin = time.perf_counter()
    finish(start(model, output, *quantized))
    whole = time.perf_counter() - begin
    manifests.append(verify(output).self_sha256)
    for share in map(float, sys.argv[3:]):
        pid = start(model, output, *quantized)
        time.sleep(whole * share)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        verify(output)
    finish(start(model, output, *quantized))
    verify(output)
    print(json.dumps(manifests))


if __name__ == "__main__":
    main()
