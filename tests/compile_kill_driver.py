"""Replaces an artifact by `optc compile`, killed at some shares of the time that it takes: prints `self_sha256` of the
manifests before and after the first replacement that ended.

Arguments: model folder, output folder, shares. The commands run in forks, so that torch is imported once.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

torch.set_num_threads(1)

# Imported once, not in each child; no tensor is touched before the forks, which threads would not survive. What the
# first command imports besides, when it needs it, `main` imports for those that follow.
import onnxruntime  # noqa: E402, F401
import transformers.models.auto.modeling_auto  # noqa: E402
import transformers.models.llama.modeling_llama  # noqa: E402, F401

from optc.cli.main import main as optc  # noqa: E402
from optc.compiler.artifact.folder import verify  # noqa: E402


def start(model: Path, output: Path, *flags: str, imported: Path | None = None) -> int:
    """The process id of `optc compile` in a fork, which writes the names of its modules to `imported`."""
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
        if imported is not None:
            imported.write_text("\n".join(sys.modules))
        os._exit(code)


def finish(pid: int) -> None:
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == 0, f"the command ended with {status}"


def main() -> None:
    model, output = map(Path, sys.argv[1:3])
    quantized = ("--quant", "rtn", "--group-size", "32")
    names = output.with_name("modules")
    finish(start(model, output, imported=names))
    for name in names.read_text().split():
        with contextlib.suppress(ImportError, AttributeError):  # parts of torch are in sys.modules and are no files
            importlib.import_module(name)
    names.unlink()
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
