"""Files of plain values in a checkpoint, whoever wrote them: bounded, and in their types."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec

from optc.compiler.diagnostics import JSON_ERRORS, InputError
from optc.compiler.files import read_plain
from optc.compiler.nesting import check_nesting

MOST_BYTES = 16 << 20
"""Of such a file; a run writes some kB. As empty lists it takes 72 bytes of memory for three of the file."""
T = TypeVar("T")


def read_state_file(path: Path, kind: type[T]) -> T:
    """The JSON of a checkpoint.

    Raises:
        InputError: missing, too large, or not what it should be.
    """
    data = read_plain(path, "reading the checkpoint", most=MOST_BYTES)
    try:
        check_nesting(msgspec.json.decode(data))
        return msgspec.json.decode(data, type=kind)
    except JSON_ERRORS as error:
        raise InputError(
            "the checkpoint is damaged",
            where=str(path),
            why=str(error),
            remedy="remove this checkpoint's folder; the one before it is used then",
        ) from error


def another_model(folder: Path, why: str) -> InputError:
    """The error for a checkpoint of another model."""
    return InputError(
        "the checkpoint belongs to another model",
        where=str(folder),
        why=why,
        remedy="give the model folder that the run started from, or another output",
    )
