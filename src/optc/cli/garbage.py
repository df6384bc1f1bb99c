"""Whether a command looks for garbage in cycles.

Importing torch and transformers and tracing graphs makes millions of objects that stay: Python's collector, which looks
through them again and again, takes a sixth of the time of a small compile, and finds next to nothing.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SMALL = 512 << 20
"""Bytes of weight files up to which a model's garbage may wait for the end of the process."""


_last = False


def leave_to_the_end() -> None:
    """This process ends with the one command that it runs: a collector that rested need not come back, to look through all
    that was made meanwhile."""
    global _last
    _last = True


@contextmanager
def uncollected() -> Iterator[None]:
    """Without the collector; as before afterwards, where anything is to come (`leave_to_the_end`)."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before and not _last:
            gc.enable()


def is_small(model: str | Path) -> bool:
    """Whether a model is a folder with so few weights that garbage of its compile does no harm."""
    return 0 < sum(path.stat().st_size for path in Path(model).glob("*.safetensors")) <= _SMALL
