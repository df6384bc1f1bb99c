"""The folder of a running server: its sockets and counters. One that was killed leaves it to the next server."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "optc-serve-"


@contextlib.contextmanager
def own_folder() -> Iterator[Path]:
    """A new folder that only this user can open (mode 0700), removed at the end of the block.

    It is locked for as long as this process lives; folders of servers that were killed are removed first.

    Raises:
        OSError: the temporary folder cannot be written.
    """
    _remove_abandoned(Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix=_PREFIX, ignore_cleanup_errors=True) as name, _open(name) as handle:
        with contextlib.suppress(OSError):  # a filesystem without locks: what a kill leaves stays
            fcntl.flock(handle, fcntl.LOCK_EX)
        folder = Path(name)
        folder.mkdir(mode=0o700, exist_ok=True)  # a server that starts just now took it for abandoned
        yield folder


def _remove_abandoned(parent: Path) -> None:
    for folder in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError), _open(folder) as handle:  # somebody else's, in use, or gone just now
            if os.fstat(handle).st_uid == os.getuid():
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)  # what cannot be removed costs only space


@contextlib.contextmanager
def _open(folder: str | Path) -> Iterator[int]:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        yield handle
    finally:
        os.close(handle)
