"""transformers without optional packages that no compile uses.

Importing what makes a model, transformers imports SciPy, for the losses of object detection, and torchao, for its
quantizers, where they are installed: a tenth of the time of a small compile.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

UNUSED = ("scipy", "torchao")
"""Packages that transformers asks for before it imports from them, and then does without."""


def import_transformers() -> None:
    """Import what makes models of folders, in a process that trains none of them.

    transformers keeps what it finds for the rest of the process: callers from Python import it themselves. The packages
    can be imported afterwards.
    """
    with absent(*UNUSED):
        importlib.import_module("transformers.modeling_utils")


@contextmanager
def absent(*packages: str) -> Iterator[None]:
    """Within, packages that nobody has imported yet look as if they were not installed."""
    modules: dict[str, ModuleType | None] = sys.modules  # type: ignore[assignment]
    hidden = [name for name in packages if name not in modules]
    modules.update(dict.fromkeys(hidden))
    try:
        yield
    finally:
        for name in hidden:
            del modules[name]
