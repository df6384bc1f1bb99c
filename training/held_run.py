"""The folder of a run belongs to one training at a time."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from optc.compiler.artifact.publishing import remove_abandoned
from optc.compiler.diagnostics import InputError, os_errors


@contextlib.contextmanager
def held_run(folder: Path, *, new: bool) -> Iterator[None]:
    """Make the folder of a run and hold it until the block ends; the kernel lets go of it with the process.

    Args:
        new: the run starts, and finds no folder. A folder that nothing was written into is removed at the end.

    Raises:
        InputError: another training holds it, it is there already, or cannot be made.
    """
    with os_errors("making the run's folder", str(folder)):
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(folder)
        try:
            folder.mkdir(exist_ok=not new)
        except FileExistsError as error:
            raise unfinished(folder) from error
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(
                "another training writes to this output",
                where=str(folder),
                remedy="wait for it, or choose another output",
            ) from error
        except OSError:
            pass  # a filesystem without locks: nothing is lost that was there before
        yield
    finally:
        os.close(handle)
        with contextlib.suppress(OSError):  # not empty: it holds the run
            folder.rmdir()


def unfinished(folder: Path) -> InputError:
    """The error for a run that would be started over another one."""
    return InputError(
        "an unfinished run of this output exists",
        where=str(folder),
        remedy="continue it with --resume, or remove the folder",
    )
