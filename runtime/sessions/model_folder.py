"""The session of a model folder: the graph that its own config and tensors capture to."""

from __future__ import annotations

from pathlib import Path

import torch

from optc.compiler.artifact.manifest import Manifest
from optc.compiler.capture.pretrained import DTYPES, capture_pretrained
from optc.runtime.sessions.program import open_program
from optc.runtime.sessions.session import Session, SessionOptions


def open_artifact(folder: Path, manifest: Manifest, options: SessionOptions) -> Session:
    """The session for a verified model folder, in the type that it was written in.

    Raises:
        InputError: the folder cannot be captured.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    dtype = next(name for name, kind in DTYPES.items() if str(kind) == f"torch.{manifest.dtype}")
    return open_program(capture_pretrained(folder, dtype=dtype)[0])
