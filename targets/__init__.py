"""One file per target."""

from optc.targets.registry import TARGETS, find_target

__all__ = ["TARGETS", "find_target"]
