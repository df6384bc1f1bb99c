"""One file per target."""

from optc.targets.registry import find_target

__all__ = ["find_target"]
