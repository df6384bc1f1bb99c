"""Plain files: reading one that a user or a folder names, and the hash of one."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path

from optc.compiler.diagnostics import InputError, os_errors

MOST_BYTES = 8 << 30
"""Of a file that is read whole."""
_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC


def read_plain(path: Path, action: str, *, most: int = MOST_BYTES, follow: bool = True) -> bytes:
    """The bytes of a plain file.

    A pipe or a device would block, or never end; asking its kind after it was opened leaves no time to put one there.

    Args:
        action: what goes on, as errors say it: "reading the recipe".
        follow: where it is a link, read what it points to.

    Raises:
        InputError: it is missing or unreadable, no plain file, or larger than `most`.
        ResourceError: out of memory.
    """
    where = str(path)
    with os_errors(action, where):
        handle = os.open(path, _FLAGS | (0 if follow else os.O_NOFOLLOW))
        with open(handle, "rb") as file:
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode):
                kind = "a folder" if stat.S_ISDIR(info.st_mode) else "a pipe, socket or device"
                raise InputError(f"failed while {action}", where=where, why=f"it is {kind}", remedy="give a plain file")
            if info.st_size > most:
                why = f"it has {info.st_size} bytes, more than {most}"
                raise InputError(f"failed while {action}", where=where, why=why, remedy="give a smaller file")
            return file.read()


def sha256_of(path: Path) -> str:
    """sha256 of a file in hex; links are not followed.

    Raises:
        OSError: it cannot be read, or is a link.
    """
    handle = os.open(path, _FLAGS | os.O_NOFOLLOW)
    with open(handle, "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
