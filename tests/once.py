"""What takes long to make and several files need: made once per run of the tests, by whichever worker comes first."""

from __future__ import annotations

import fcntl
import functools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import EXAMPLE

import optc

_PLACE: list[Path] = []


def set_place(folder: Path) -> None:
    """Where this run's things are kept, the same for all workers."""
    _PLACE[:] = [folder]


def once(name: str, make: Callable[[Path], object]) -> Path:
    """A folder that `make(folder)` filled, by the first caller of this name; read-only."""
    place = _PLACE[0] / name
    done = place.with_name(f"{name}.done")
    with open(place.with_name(f"{name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(place, ignore_errors=True)  # left by a maker that failed
            place.mkdir()
            make(place)
            done.touch()
    return place


def example_artifact(target: str, **options: Any) -> Path:
    """The example model, compiled as `optc compile` does; read-only: what edits it takes a copy."""
    name = "-".join(["example", target, *(f"{key}={value}" for key, value in sorted(options.items()))])
    make = functools.partial(_compile_example, target=target, **options)
    return once(name, make) / "artifact"


def _compile_example(folder: Path, **options: Any) -> None:
    optc.compile(EXAMPLE, output=folder / "artifact", **options)
