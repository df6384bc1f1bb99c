"""One writer, run again and again in forked children, and struck by `shim.c` at one of its file operations."""

from __future__ import annotations

import copy
import ctypes
import errno
import faulthandler
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from fuzz.writer import Writer

FAULTS = {
    "kill": {"FAULT_KIND": "kill"},
    "power loss": {"FAULT_KIND": "kill"},
    "short write": {"FAULT_KIND": "short"},
    "ENOSPC once": {"FAULT_KIND": str(errno.ENOSPC)},
    "ENOSPC for good": {"FAULT_KIND": str(errno.ENOSPC), "FAULT_STICKY": "1"},
    "EIO once": {"FAULT_KIND": str(errno.EIO)},
    "EIO for good": {"FAULT_KIND": str(errno.EIO), "FAULT_STICKY": "1"},
}
"""Kind -> what `shim.c` is told."""
EXPECTED = {
    "kill": (-signal.SIGKILL,),
    "power loss": (-signal.SIGKILL,),
    "short write": (0,),
    "ENOSPC once": (8, 0),
    "ENOSPC for good": (8, 0),
    "EIO once": (3, 0),
    "EIO for good": (3, 0),
}
"""Exit codes; 0 where the output was published, or the operation did not matter."""
_HASH = re.compile(r"\.[0-9a-f]{64}\.")  # of what was written, the seconds that it took among it
_DIED = "Fatal Python error"  # how the trace of `faulthandler` begins
_END_WITH_PARENT = 1  # PR_SET_PDEATHSIG


class Striker:
    """A writer in a folder of its own; `moved` gives the same in another folder, for another process.

    Attributes:
        points: file operations of one writing.
    """

    def __init__(self, name: str, writer: Writer, folder: Path) -> None:
        self.name, self.writer = name, writer
        self._settle(folder)
        self.before = writer.state(writer.old) if writer.old is not None else ""
        self.restore()
        code = waited(self._forked(writer.write, {}))
        if code != 0:
            raise RuntimeError(f"{name}: the writer itself ends with exit code {code}: {self._said()}")
        self.points = len(self.log.read_text().splitlines())
        self.after, self.clean = writer.state(self.place), self._names()

    def moved(self, folder: Path) -> Striker:
        """The same writer in another folder."""
        other = copy.copy(self)
        other._settle(folder)
        return other

    def _settle(self, folder: Path) -> None:
        self.folder, self.parent = folder, folder / "place"
        self.place = self.parent / self.writer.name
        self.log, self.stderr, self.count = folder / "operations.log", folder / "stderr", folder / "count"
        (folder / "tmp").mkdir(parents=True, exist_ok=True)

    def restore(self) -> None:
        """The old output, and nothing else."""
        shutil.rmtree(self.parent, ignore_errors=True)
        self.parent.mkdir(parents=True)
        if self.writer.old is not None and self.writer.old.is_dir():
            shutil.copytree(self.writer.old, self.place)
        elif self.writer.old is not None:
            shutil.copyfile(self.writer.old, self.place)

    def strike(self, what: str, number: int, rerun: bool) -> Generator[int, int, dict[str, Any]]:
        """One fault at one operation.

        Args:
            rerun: run the writer again where it did not end well, which must end as if nothing had been.

        Yields:
            a child's process; its exit code, or minus its signal, is to be sent.

        Returns:
            the outcome, what is wrong with it, and whether the writer was run again.
        """
        begin = time.monotonic()
        self.restore()
        code = yield self._forked(self.writer.write, {"FAULT_N": str(number), **FAULTS[what]})
        if what == "power loss":
            lose_unsynced(self.log, self.parent)
        found = self._found()
        left = self._left(self.clean if found == "new" else [])
        row: dict[str, Any] = {"number": number, "kind": what, "outcome": f"{what}: {found}, exit {code}"}
        where = f"{what} at {number} of {self.points}: {self._operation(number)}"
        refused = found == "broken" and self.writer.mended and code != 0
        done = code < 0 or (code > 0 and found != "aside") or found == "new" or self.writer.optional
        if not ((found != "broken" or refused) and (code < 0 or not left) and code in EXPECTED[what] and done):
            said = "" if code == -signal.SIGKILL else self._said()
            row["wrong"] = f"{where}: {found}, exit {code}, beside it {left[:5]} {said}"
        elif refused or (code != 0 and rerun):
            again = yield self._forked(self.writer.again or self.writer.write, {})
            row |= {"rerun": True, **self._other(again, where)}
        return {**row, "seconds": round(time.monotonic() - begin, 2)}

    def _other(self, code: int, where: str) -> dict[str, str]:
        """What is wrong after the writer was run again."""
        found, names = self._found(), self._names()
        if code == 0 and names == self.clean and found == "new":
            return {}
        other = [name for name in {*names, *self.clean} if names.count(name) != self.clean.count(name)][:5]
        return {"wrong": f"rerun after {where}: {found}, exit {code}, other names {other} {self._said()}"}

    def _forked(self, write: Callable[[Path], None], settings: dict[str, str]) -> int:
        """The process of one more writing."""
        self.log.unlink(missing_ok=True)
        self.count.write_bytes(bytes(8))
        watched = {"FAULT_DIR": str(self.parent), "FAULT_LOG": str(self.log), "FAULT_COUNT": str(self.count)}
        pid = os.fork()
        if pid == 0:
            os.environ |= {**watched, "TMPDIR": str(self.folder / "tmp"), **settings}
            _child(lambda: write(self.place), self.stderr)
        return pid

    def _found(self) -> str:
        """What stands at the output: old, new or broken; aside: the old one beside it, where no two names can be swapped."""
        if not self.place.exists():
            aside = list(self.place.parent.glob(f".{self.place.name}.old-*"))
            whole = len(aside) == 1 and self.writer.state(aside[0]) == self.before
            return "old" if not self.before else "aside" if whole else "broken"
        try:
            state = self.writer.state(self.place)
        except Exception:  # noqa: BLE001 (whatever says so, it is not whole)
            return "broken"
        return "new" if state == self.after else "old" if state == self.before else "broken"

    def _names(self) -> list[str]:
        """Everything below the folder of the output, but the output's own files; without the hashes in names."""
        found = [path.relative_to(self.parent) for path in self.parent.rglob("*")]
        own = Path(self.writer.name)
        kept = (str(path) for path in found if not path.is_relative_to(own) or path.name.startswith("."))
        return sorted(_HASH.sub(".HASH.", name) for name in kept)

    def _left(self, clean: list[str]) -> list[str]:
        """Names beside the output that should not be there after an error; `clean`: those of a writing that ends well."""
        kept = self.writer.kept
        names = (name for name in self._names() if name not in clean)
        return [name for name in names if name.partition("/")[0] not in kept or "/." in name or "/tmp" in name]

    def _operation(self, number: int) -> str:
        """What the operation was, as the log has it."""
        lines = self.log.read_text(errors="replace").splitlines()
        return lines[number - 1].replace(str(self.parent), "") if len(lines) >= number else ""

    def _said(self) -> str:
        """The end of what the child wrote, or where it was when it died of a fault."""
        text = self.stderr.read_text(errors="replace")
        return text[text.index(_DIED) :][:3000] if _DIED in text else text[-300:]


def end_with_parent() -> None:
    """Let this process be killed when its parent ends (prctl(2))."""
    ctypes.CDLL(None).prctl(_END_WITH_PARENT, signal.SIGKILL)


def _child(write: Callable[[], None], stderr: Path) -> None:
    import torch

    from optc.cli.common import guarded  # imported before by main

    torch.set_num_threads(
        1
    )  # a package that was opened before took all processors, and a fork has no threads of its own
    os.setpgid(0, 0)  # what it starts is killed with it
    end_with_parent()
    null, said = os.open(os.devnull, os.O_WRONLY), os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(null, 1)
    os.dup2(said, 2)
    faulthandler.enable(said, all_threads=True)
    code = 70
    try:
        code = guarded(write, as_json=False)
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else 0
    finally:
        os._exit(code)


def waited(pid: int) -> int:
    """The exit code of a child, or minus its signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def lose_unsynced(log: Path, folder: Path) -> None:
    """Cut files that were written after their last sync to what they were at it."""
    synced, dirty = dict[int, int](), set[int]()
    for line in log.read_text().splitlines():
        operation, inode, size, _ = line.split(" ", 3)
        if operation == "write":  # its size before: a new file may have the number of one that is gone
            dirty.add(int(inode))
            synced[int(inode)] = min(int(size), synced.get(int(inode), 0))
        elif operation == "fsync":
            dirty.discard(int(inode))
            synced[int(inode)] = int(size)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and (found := path.stat()).st_ino in dirty:
            os.truncate(path, min(found.st_size, synced.get(found.st_ino, 0)))


def spread(points: int, most: int) -> list[int]:
    """Up to `most` of the numbers from 1 to `points`, evenly, so that an early end leaves none of the parts out."""
    count = min(most, points)
    chosen = sorted({1 + round(index * (points - 1) / max(1, count - 1)) for index in range(count)})
    strides = [chosen[first::8] for first in range(8)]
    return [number for stride in strides for number in stride]
