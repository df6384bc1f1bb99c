"""The other end of `vllm_worker.py`: a vLLM that runs beside the process that measures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

WORKER = Path(__file__).with_name("vllm_worker.py")


class VllmPeer:
    """A model in vLLM.

    Args:
        site: folder that holds the package vllm and what it needs, put in front of PYTHONPATH.
        model: model folder. options: arguments of `vllm.LLM`.
        log: file for vLLM's own output.

    Attributes:
        version: of vLLM. seconds: that it took to open; both from `wait` on.
    """

    def __init__(self, site: Path, model: Path, options: dict[str, Any], log: Path) -> None:
        self.version, self.seconds, self._log = "", 0.0, log
        self._log_file = log.open("wb")
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER), str(model), "--options", json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log_file,
            env={**os.environ, "PYTHONPATH": str(site)},
            text=True,
        )

    def wait(self) -> VllmPeer:
        """Until it is ready.

        Raises:
            RuntimeError: it ended before; with the end of its log.
        """
        ready = self._read()
        self.version, self.seconds = ready["version"], ready["ready"]
        return self

    def ask(self, do: str, **request: Any) -> dict[str, Any]:
        """See `vllm_worker`."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **request}) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"vLLM ended: {self._log.read_text(errors='replace')[-3000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> VllmPeer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log_file.close()
