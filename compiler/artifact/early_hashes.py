"""Hashes of what was written, taken and synced to the disk beside what is still done with it: of gigabytes both take seconds."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Self

from optc.compiler import files
from optc.compiler.files import FileStamp, file_stamp, sha256_of, sync_file

_FILES = 4  # at a time; a thread more for each, which syncs


class EarlyHashes:
    """The sha256 of every large file that a folder has when the block begins; threads end with the block.

    What is written later has no hash here, and a file that was changed since has none any more.

    Raises (at the end of the block):
        OSError: a file cannot be read or synced.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._hashes: dict[str, tuple[FileStamp, Future[str]]] = {}
        self._syncs: list[Future[None]] = []

    def __enter__(self) -> Self:
        self._pool = ThreadPoolExecutor(2 * _FILES, "optc-hash")
        large = [path for path in self._folder.rglob("*") if path.is_file() and not path.is_symlink()]
        large = [path for path in large if path.stat().st_size >= files.LARGE_BYTES]
        for path in large if (os.cpu_count() or 1) > 1 else ():
            found = file_stamp(path), self._pool.submit(sha256_of, path)
            self._hashes[path.relative_to(self._folder).as_posix()] = found
            self._syncs.append(self._pool.submit(sync_file, path))
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        self._pool.shutdown(cancel_futures=kind is not None)
        if kind is None:
            for _, digest in self._hashes.values():
                digest.result()
            for sync in self._syncs:
                sync.result()

    def of(self, name: str) -> str | None:
        """The hash of a file by its POSIX path in the folder; None where there is none that holds."""
        found = self._hashes.get(name)
        if found is None or file_stamp(self._folder / name) != found[0]:
            return None
        return found[1].result()
