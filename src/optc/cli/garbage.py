"""How often a command looks for garbage in cycles.

Importing torch and transformers and tracing graphs makes a million objects that stay: Python's collector, which looks
through all of them again and again, takes a sixth of the time of a small compile, and finds next to nothing.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_SELDOM = (100_000, 50, 100)
"""New objects between two looks, and looks between those at older ones; Python's own are 700, 10 and 10."""

_SMALL = 512 << 20
"""Bytes of weight files up to which a model's garbage may wait."""


@contextmanager
def rarely_collected() -> Iterator[None]:
    """Look seldom; as before afterwards."""
    before = gc.get_threshold()
    gc.set_threshold(*_SELDOM)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def is_small(model: str | Path) -> bool:
    """Whether a model is a folder with so few weights that garbage of its compile does no harm."""
    return 0 < sum(path.stat().st_size for path in Path(model).glob("*.safetensors")) <= _SMALL
