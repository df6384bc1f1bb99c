"""Finished stages on disk, so that a killed compile continues where it was."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import msgspec

from optc.compiler.artifact.manifest import PassRecord
from optc.compiler.diagnostics import JSON_ERRORS, InputError, os_errors
from optc.compiler.ir.program import Program

_RECORD = "record.json"


def save_stage(folder: Path, program: Program, record: PassRecord) -> None:
    """Write a stage to a temporary sibling and rename it: it is whole or it is absent."""
    with os_errors("saving a stage", str(folder)):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".stage-", dir=folder.parent))
        try:
            program.save(temporary)
            (temporary / _RECORD).write_bytes(msgspec.json.encode(record))
            os.rename(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def load_stage(folder: Path) -> tuple[Program, PassRecord]:
    """Read a stage back.

    Raises:
        InputError, ArtifactError: the stage is damaged.
    """
    with os_errors("reading a stage", str(folder)):
        data = (folder / _RECORD).read_bytes()
    try:
        record = msgspec.json.decode(data, type=PassRecord)
    except JSON_ERRORS as error:
        raise InputError(
            "a saved stage is damaged",
            where=str(folder / _RECORD),
            why=str(error),
            remedy="delete the work folder",
        ) from error
    return Program.load(folder), record
