"""Versions: of optc, installed or run from its source tree, and of what else is installed."""

from __future__ import annotations

import functools
import tomllib
from importlib import metadata
from pathlib import Path

UNKNOWN = "0+unknown"


@functools.cache
def version() -> str:
    """The installed version; from a source tree without one, that of its pyproject.toml."""
    try:
        return metadata.version("optc")
    except metadata.PackageNotFoundError:
        pass
    path = Path(__file__).resolve().parents[1] / "pyproject.toml"
    try:
        project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    except (OSError, tomllib.TOMLDecodeError, KeyError):
        return UNKNOWN
    return str(project["version"]) if project.get("name") == "optc" and "version" in project else UNKNOWN


def version_of(package: str) -> str:
    """Of the installed distribution of this name, or of one that brings the module of this name, as onnxruntime-gpu
    brings `onnxruntime`; "" where there is neither."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        brings = metadata.packages_distributions().get(package, [])
    return metadata.version(brings[0]) if brings else ""
