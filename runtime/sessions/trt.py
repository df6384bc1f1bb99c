"""Session over a TensorRT plan: the code of run_trt.py, which also travels in the artifact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from optc.compiler.artifact.manifest import Manifest
from optc.compiler.diagnostics import (
    ArtifactError,
    GateError,
    InputError,
    OptcError,
    ResourceError,
    TargetError,
    UsageError,
)
from optc.runtime.carried.run_trt import Decoder, RunnerError, TrtEngine, read_description
from optc.runtime.sessions.session import Logits, Rows, Session, SessionOptions

T = TypeVar("T")
_KINDS: dict[int, type[OptcError]] = {
    kind.exit_code: kind for kind in (UsageError, InputError, TargetError, GateError, ArtifactError, ResourceError)
}


class TrtSession(Session):
    """A decoder on an engine of `run_trt`'s interface.

    Args:
        engine: see `run_trt.Decoder`; its capacity is the session's context.
    """

    def __init__(self, engine: Any) -> None:
        super().__init__(vocab_size=engine.vocab_size, context_length=engine.capacity)
        self._engine, self._decoder = engine, Decoder(engine)

    def close(self) -> None:
        self._engine.close()

    def _start(self, batch: int) -> None:
        translated(lambda: self._decoder.start(batch))

    def _advance(self, rows: Rows) -> Logits:
        logits: Logits = translated(lambda: self._decoder.advance(rows))
        self.lengths = [len(row) for row in self._decoder.rows]
        return logits

    def _score(self, tokens: Sequence[int]) -> Logits:
        logits: Logits = translated(lambda: self._decoder.score(tokens))
        self.lengths = [len(row) for row in self._decoder.rows]
        return logits

    def _rewind(self, lengths: Sequence[int]) -> None:
        self._decoder.rewind(lengths)


def open_artifact(folder: Path, _manifest: Manifest, _options: SessionOptions) -> Session:
    """The session for a verified TensorRT artifact.

    Raises:
        TargetError: no driver, GPU, TensorRT of the plan's version, or no plan yet.
        ArtifactError: engine.json and the plan do not belong together.
        ResourceError: out of GPU memory.
    """
    return translated(lambda: TrtSession(TrtEngine(str(folder), read_description(str(folder)))))


def translated(action: Callable[[], T]) -> T:
    """The runner's errors as optc's, by exit code."""
    try:
        return action()
    except RunnerError as error:
        raise _KINDS[error.exit_code](str(error)) from error
