"""The passes by name: every concrete `Pass` in this package, and those that other packages register.

Another package adds its passes by an entry point of the group `optc.passes`, whose value is a module that holds
them or a pass class.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import pkgutil
import sys
from collections.abc import Iterator
from types import ModuleType

import optc.passes
from optc.compiler.diagnostics import UsageError, unknown_name
from optc.compiler.plugins import plugins
from optc.compiler.rewriting.passes import Pass

ENTRY_POINTS = "optc.passes"


@functools.cache
def passes() -> dict[str, type[Pass]]:
    """Every pass by its name, sorted.

    Raises:
        UsageError: a registered module cannot be imported, or two passes have one name.
    """
    found: dict[str, type[Pass]] = {}
    for cls in (*_own(), *_registered()):
        other = found.setdefault(cls.name, cls)
        if other is not cls:
            raise UsageError(
                f"two passes are named '{cls.name}'",
                where=f"{other.__module__} and {cls.__module__}",
                remedy="rename one, or uninstall the package that it comes from",
            )
    return dict(sorted(found.items()))


def find_pass(name: str) -> type[Pass]:
    """The pass class of this name, hyphen and underscore being the same; or `module:Class`, which is imported.

    Raises:
        UsageError: unknown, with the nearest name; a module that cannot be imported, or a class that is no pass.
    """
    if ":" in name:
        return _imported(name)
    plain = name.replace("_", "-")
    known = passes()
    if plain not in known:
        raise unknown_name("pass", name, known)
    return known[plain]


def _imported(name: str) -> type[Pass]:
    """A pass by module and class; modules are looked for in the working folder too, as `python -m` does."""
    module, _, attribute = name.partition(":")
    folder = os.getcwd()
    added = folder not in sys.path
    if added:
        sys.path.append(folder)
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(
            f"the pass '{name}' cannot be imported", why=str(error), remedy="write module:Class, as in my_passes:MyPass"
        ) from error
    finally:
        if added:
            sys.path.remove(folder)
    if not (inspect.isclass(found) and issubclass(found, Pass) and isinstance(getattr(found, "name", None), str)):
        raise UsageError(
            f"'{name}' is not a pass",
            why="it is no subclass of optc.Pass with a name",
            remedy="see docs/write-a-pass.md",
        )
    return found


def _own() -> Iterator[type[Pass]]:
    for info in pkgutil.walk_packages(optc.passes.__path__, "optc.passes."):
        if not info.ispkg and info.name != __name__:
            yield from _in_module(importlib.import_module(info.name))


def _registered() -> Iterator[type[Pass]]:
    for found in plugins(ENTRY_POINTS, "a pass or a module of passes", _taken):
        yield from found


def _taken(loaded: object) -> list[type[Pass]] | None:
    if inspect.ismodule(loaded):
        return list(_in_module(loaded))
    return [loaded] if inspect.isclass(loaded) and issubclass(loaded, Pass) else None


def _in_module(module: ModuleType) -> Iterator[type[Pass]]:
    """The passes that a module defines itself (bases without a name are not passes)."""
    for _, cls in inspect.getmembers(module, inspect.isclass):
        if issubclass(cls, Pass) and cls.__module__ == module.__name__ and hasattr(cls, "name"):
            yield cls
