"""Finished stages on disk, so that a killed compile continues where it was."""

from __future__ import annotations

from pathlib import Path

import msgspec

from optc.compiler.artifact.manifest import PassRecord
from optc.compiler.artifact.publishing import write_folder
from optc.compiler.diagnostics import JSON_ERRORS, ArtifactError, os_errors
from optc.compiler.files import damage, read_plain, write_sums
from optc.compiler.ir.program import Program
from optc.compiler.nesting import check_nesting

_RECORD = "record.json"
_MOST_RECORD = 64 << 20  # bytes; a row of each linear has some hundred


def save_stage(folder: Path, program: Program, record: PassRecord) -> None:
    """Write a stage, synced and with the hashes of its files: it is whole or it is absent.

    Raises:
        InputError, ResourceError: it cannot be written, or the disk is full.
    """
    with write_folder(folder, force=False) as directory:
        program.save(directory)
        (directory / _RECORD).write_bytes(msgspec.json.encode(record))
        write_sums(directory)


def load_stage(folder: Path) -> tuple[Program, PassRecord]:
    """Read a stage back.

    Raises:
        ArtifactError: a file was changed since it was written.
        InputError, ResourceError: it cannot be read.
    """
    with os_errors("reading a stage", str(folder)):
        why = damage(folder)
    if why is not None:
        raise _damaged(folder, why)
    try:
        record = msgspec.json.decode(
            read_plain(folder / _RECORD, "reading a stage", most=_MOST_RECORD), type=PassRecord
        )
        check_nesting(record.options)
    except JSON_ERRORS as error:
        raise _damaged(folder / _RECORD, str(error)) from error
    return Program.load(folder), record


def _damaged(path: Path, why: str) -> ArtifactError:
    return ArtifactError(
        "a saved stage is damaged", where=str(path), why=why, remedy="delete this folder and run again"
    )
