"""The hash of a model's weights, taken beside what is done with them: of tens of gigabytes it takes as long as a forward."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Self

from optc.compiler.files import LARGE_BYTES
from optc.compiler.model_folder.checkpoint import CheckpointInfo, check_stamp, stamped_bytes, weights_digest


class SourceHash:
    """`weights_digest` of a folder; of large weights it begins at once, in a thread that ends with the block.

    Args:
        info: the checked folder, or None of a model in memory.
    """

    def __init__(self, info: CheckpointInfo | None) -> None:
        self._info, self._stop = info, threading.Event()
        beside = info is not None and stamped_bytes(info) >= LARGE_BYTES and (os.cpu_count() or 1) > 1
        self._pool = ThreadPoolExecutor(1, "optc-hash") if beside else None

    def __enter__(self) -> Self:
        if self._pool is not None and self._info is not None:
            self._found = self._pool.submit(weights_digest, self._info, self._stop.is_set)
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        if self._pool is not None:
            self._pool.shutdown()

    def result(self) -> str:
        """The digest of files that are still those which were checked.

        Raises:
            InputError: one of them is not.
        """
        assert self._info is not None, "a model in memory has no files"
        if self._pool is None:
            return weights_digest(self._info)
        found = self._found.result()
        for file in (*self._info.files, *self._info.behind):  # what was read later came from the same files
            check_stamp(self._info, file)
        return found
