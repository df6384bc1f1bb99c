"""Session over an ExecuTorch program: forward(tokens [1,S], start [1]) -> logits [1,S,V], caches inside.

A loaded program holds one sequence. Further rows of a batch load it again, each with caches and packed weights of
its own: right, but not cheap.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from optc.compiler.artifact.manifest import Manifest
from optc.compiler.diagnostics import TargetError
from optc.runtime.sessions.session import Logits, Rows, Session, SessionOptions


class ExecutorchSession(Session):
    """A decoder in ExecuTorch's Python runtime.

    Args:
        folder: the artifact, verified.
        threads: of ExecuTorch's pool, which belongs to the process; None leaves it as it is.

    Raises:
        TargetError: ExecuTorch is not installed, or it cannot load the program.
    """

    def __init__(self, folder: Path, manifest: Manifest, *, threads: int | None = None) -> None:
        info = manifest.engine_info
        super().__init__(vocab_size=int(info["vocab_size"]), context_length=int(info["context_length"]))
        self._path, self._most = folder / info["model"], int(info["chunk"])
        try:
            from executorch.extension.pybindings import portable_lib
            from executorch.runtime import Runtime
        except ModuleNotFoundError as error:
            raise TargetError(
                "ExecuTorch is not installed",
                where=str(folder),
                why=str(error),
                remedy='pip install "optc[executorch]"',
            ) from error
        if threads is not None:
            portable_lib._unsafe_reset_threadpool(threads)
        self._runtime = Runtime.get()
        self._methods: list[Any] = []
        self._open(1)

    @property
    def chunk(self) -> int:
        return self._most

    def close(self) -> None:
        self._methods = []

    def _open(self, rows: int) -> None:
        """Load the program until there is one for each row."""
        while len(self._methods) < rows:
            try:
                method = self._runtime.load_program(self._path).load_method("forward")
            except RuntimeError as error:
                raise TargetError(
                    "ExecuTorch cannot load the program",
                    where=str(self._path),
                    why=str(error).splitlines()[0],
                    remedy="use the version that the manifest names under needs, or a later one",
                ) from error
            assert method is not None
            self._methods.append(method)

    def _start(self, batch: int) -> None:
        self._open(batch)
        self.lengths = [0] * batch

    def _advance(self, rows: Rows) -> Logits:
        last: Logits = np.stack([self._feed(index, row)[-1] for index, row in enumerate(rows)])
        return last

    def _score(self, tokens: Sequence[int]) -> Logits:
        return self._run(0, tokens)

    def _feed(self, row: int, tokens: Sequence[int]) -> Logits:
        """Append any number of tokens; logits of the last call."""
        for start in range(0, len(tokens), self._most):
            logits = self._run(row, tokens[start : start + self._most])
        return logits

    def _run(self, row: int, tokens: Sequence[int]) -> Logits:
        """Append at most `chunk` tokens to a row; logits [n, V]."""
        inputs = [torch.tensor([list(tokens)]), torch.tensor([self.lengths[row]])]
        (logits,) = self._methods[row].execute(inputs)
        self.lengths[row] += len(tokens)
        found: Logits = logits[0].float().numpy()
        return found


def open_artifact(folder: Path, manifest: Manifest, options: SessionOptions) -> Session:
    """The session for a verified ExecuTorch artifact; see `ExecutorchSession`."""
    return ExecutorchSession(folder, manifest, threads=options.threads)
