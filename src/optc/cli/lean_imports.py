"""transformers in a process of the command line: without optional packages that no compile uses, and listed faster.

Importing what makes a model, transformers imports SciPy, for the losses of object detection, torchao, for its
quantizers, and accelerate, where they are installed: a tenth of the time of a small compile. Before, it reads all of its
modules for what they export, line by line: another fifteenth.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

UNUSED = ("scipy", "torchao", "accelerate")
"""Packages that transformers asks for before it imports from them, and then does without."""
_LISTING = "transformers.utils.import_utils"


def import_transformers() -> None:
    """Import what makes models of folders, in a process that trains none of them.

    transformers keeps what it finds for the rest of the process: callers from Python import it themselves. The packages
    can be imported afterwards.
    """
    finder = _QuickListing()
    sys.meta_path.insert(0, finder)
    try:
        with absent(*UNUSED):
            importlib.import_module("transformers.modeling_utils")
    finally:
        sys.meta_path.remove(finder)


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


class _QuickListing:
    """Finds the module of transformers that lists the others, and gives it a quicker `fetch__all__` once it is there."""

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if name == _LISTING else None
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if fetch := getattr(module, "fetch__all__", None):
                setattr(module, "fetch__all__", from_the_last_list(fetch))  # noqa: B010 (no attribute that mypy knows)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def from_the_last_list(fetch: Callable[[str], list[str]]) -> Callable[[str], list[str]]:
    """transformers' reader of `__all__`, which looks for the last line that begins with it, of what begins there."""
    return lambda content: fetch(content[content.rfind("\n__all__") + 1 :])
