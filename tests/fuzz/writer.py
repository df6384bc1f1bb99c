"""What the campaign against the disk (`disk.py`) knows of a writer, and what writers share."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuzz.seeds import Seeds


@dataclass
class Writer:
    """Something that is written to a place that is given.

    Attributes:
        write: writes it there, once more.
        state: what it is, of equal outputs equal; raises of one that is not whole.
        old: what stands there before, if anything.
        again: what is run after a kill, a power loss or a failing disk; without it `write`.
        kept: names beside it that may be left for `again` to go on from; none may be left after it.
        name: of the place in its folder.
        optional: it does without where the disk does not let it.
        mended: between the new names of its files a kill leaves what is refused, until it has run again.
    """

    write: Callable[[Path], None]
    state: Callable[[Path], str]
    old: Path | None = None
    again: Callable[[Path], None] | None = None
    kept: tuple[str, ...] = ()
    name: str = "output"
    optional: bool = False
    mended: bool = False


@dataclass(frozen=True)
class Kind:
    """A writer before it is made ready.

    Attributes:
        make: makes it ready, from seeds and in a folder of its own.
        packages: that it needs. light: it imports neither an engine nor the command line.
    """

    make: Callable[[Seeds, Path], Writer]
    packages: tuple[str, ...] = ()
    light: bool = False

    def missing(self) -> str:
        """Why it cannot run here; empty where it can."""
        lacking = [package for package in self.packages if importlib.util.find_spec(package) is None]
        return f"needs {', '.join(lacking)}, not installed here" if lacking else ""


def run_optc(*arguments: object) -> None:
    """A command that has to end well."""
    try:
        optc_code(*arguments)
    except SystemExit as done:
        if done.code not in (0, None):
            raise RuntimeError(f"optc {arguments} ended with {done.code}") from done


def optc_code(*arguments: object) -> None:
    """A command whose exit code is that of the process."""
    from optc.cli.main import main

    main([str(item) for item in arguments])


def artifact_state(folder: Path) -> str:
    """The hashes of an artifact's files, but of those that tell times."""
    from optc.compiler.artifact.folder import verify

    entries = verify(folder).files
    return json.dumps([entry.sha256 for entry in entries if entry.path not in ("report.html", "SHA256SUMS")])


def old_artifact(seeds: Seeds) -> Path:
    """What the writers of artifacts replace."""
    return seeds.compiled("old", "--target", "vllm", "--quant", "rtn", "--group-size", "32")


def sums_state(folder: Path) -> str:
    """The hash of the hashes that a folder has in it."""
    return hashlib.sha256((folder / "SHA256SUMS").read_bytes()).hexdigest()


def unless_there(write: Callable[[Path], None]) -> Callable[[Path], None]:
    """What goes on from what is there."""
    return lambda place: None if place.exists() else write(place)


def keep_templates() -> None:
    """Let templates of reports be compiled once: that is a third of what writing a small model takes."""
    import jinja2

    real, made = jinja2.Environment.compile, dict[Any, Any]()

    def compile(self: jinja2.Environment, source: Any, *names: Any, **more: Any) -> Any:
        key = (source, names, *sorted(more.items()))
        if key not in made:
            made[key] = real(self, source, *names, **more)
        return made[key]

    jinja2.Environment.compile = compile  # type: ignore[method-assign, assignment]


def once(module: str, name: str) -> None:
    """Let a function of a module be computed once: later calls have the first one's result, of a graph that of the graph."""
    real, found = getattr(importlib.import_module(module), name), dict[str, Any]()

    @functools.wraps(real)
    def first(*given: Any, **named: Any) -> Any:
        key = str(getattr(given[0], "code", ""))
        if key not in found:
            found[key] = real(*given, **named)
        return found[key]

    setattr(importlib.import_module(module), name, first)
