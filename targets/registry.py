"""The targets by name and alias: every module of this package that has one, and those of other packages. The options of
this package's targets are known without the targets themselves, which import torch.

Another package adds a target by an entry point of the group `optc.targets`, whose value is a `Target` or a module
with one as its `TARGET`. A target module is imported when it is asked for.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import pkgutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

import optc.exporters.options
import optc.targets
from optc.compiler.diagnostics import TargetError, UsageError, unknown_name
from optc.compiler.plugins import plugins
from optc.compiler.settings.fields import check_type
from optc.compiler.target.options import TargetOptions

if TYPE_CHECKING:
    from optc.compiler.target.target import Target

ENTRY_POINTS = "optc.targets"


def find_target(name: str) -> Target:
    """The target of this name or alias; hyphen and underscore are the same.

    Raises:
        UsageError: unknown, with the nearest name; no text; or two targets have one name.
        TargetError: a package that it needs is not installed.
    """
    check_type("target", name, str, "the name of a target (optc targets)")
    plain = name.replace("_", "-")
    module = f"optc.targets.{plain.replace('-', '_')}"
    if plain.replace("-", "_").isidentifier() and importlib.util.find_spec(module) is not None:
        found = _in_module(module, needed=True)  # named like its file: the others are not imported
        if found is not None:
            return found
    known = targets()
    if plain not in known:
        raise unknown_name("target", name, known)
    return known[plain]


@functools.cache
def targets() -> dict[str, Target]:
    """Every target whose packages are installed, by name and by alias.

    Raises:
        UsageError: a registered target cannot be imported, or two have one name.
    """
    found: dict[str, Target] = {}
    for target in (*_own(), *_others()):
        for name in (target.name, *target.aliases):
            other = found.setdefault(name, target)
            if other is not target:
                raise UsageError(
                    f"two targets are named '{name}'",
                    where=f"{other.export.__module__} and {target.export.__module__}",
                    remedy="rename one, or uninstall the package that it comes from",
                )
    return found


def all_targets() -> Iterator[Target]:
    """Every target whose packages are installed, once, by name."""
    return (target for name, target in sorted(targets().items()) if name == target.name)


def target_options() -> dict[str, type[TargetOptions]]:
    """The struct of each target's own options, by the target's name and in that order; torch is not imported for those
    of this package.

    Raises:
        UsageError: a registered target cannot be imported.
    """
    found = {target.name: target.options for target in _others()}
    for info in pkgutil.iter_modules(optc.exporters.options.__path__, "optc.exporters.options."):
        for value in vars(importlib.import_module(info.name)).values():
            if isinstance(value, type) and issubclass(value, TargetOptions) and value.target:
                found[value.target] = value
    return dict(sorted(found.items()))


def _others() -> Iterator[Target]:
    return plugins(ENTRY_POINTS, "a target or a module with a TARGET", _taken)


def _own() -> Iterator[Target]:
    for info in pkgutil.iter_modules(optc.targets.__path__, "optc.targets."):
        found = _in_module(info.name) if info.name != __name__ else None
        if found is not None:
            yield found


def _in_module(module: str, *, needed: bool = False) -> Target | None:
    """The target of a module; None where it has none, or a package of others that it imports is missing.

    Raises:
        TargetError: such a package is missing, and the target is `needed`.
    """
    try:
        found = getattr(importlib.import_module(module), "TARGET", None)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "optc":
            raise
        if not needed:
            return None
        raise TargetError(
            f"the target of {module} needs the package '{error.name}', which is not installed",
            remedy='install it, by an extra of optc: pip install "optc[onnx]", "optc[trt]", ...',
        ) from error
    return _taken(found)


def _taken(loaded: object) -> Target | None:
    from optc.compiler.target.target import Target

    target = getattr(loaded, "TARGET", loaded)
    return target if isinstance(target, Target) else None
