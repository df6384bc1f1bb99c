"""Kills, failing disks and power losses at every file operation of optc's writers: `make faults`, or

    python -m fuzz.disk --work /tmp/faults [--writers onnx,checkpoint] [--most 200] [--json FILE]

A writer is replayed in forked children over an old output; a library in front of the C library (`shim.c`) counts what it
does with files and strikes at one operation. Each time the output must be the old one or the new one, whole; after an
error nothing may lie beside it, and after a kill nothing once the writer has run again. A power loss is a kill after
which files hold what they held when they were synced last, nothing if never, and their names stay: the harshest that a
filesystem may do (Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014). Needs a C compiler and Linux.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fuzz.seeds import Seeds
from fuzz.writers import LIGHT, SLOW, WRITERS

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
_LIMIT_SECONDS = 120.0
_HASH = re.compile(r"\.[0-9a-f]{64}\.")  # of what was written, the seconds that it took among it


def shim(work: Path) -> Path:
    """The library, compiled."""
    place, source = work / "shim.so", Path(__file__).with_name("shim.c")
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-w", "-o", place, source, "-ldl"], check=True)
    return place


class Strikes:
    """A writer, struck again and again.

    Args:
        rerun: after every so many strike of a kind the writer is run again, which must end as if nothing had been.
    """

    def __init__(self, name: str, seeds: Seeds, work: Path, rerun: int) -> None:
        shutil.rmtree(work, ignore_errors=True)
        self.name, self.rerun, self.log = name, rerun, work / "operations.log"
        self.writer = WRITERS[name](seeds, work)
        self.place, self.parent, self.keep = self.writer.place, self.writer.place.parent, work / "old"
        self.before = ""
        if self.place.exists():
            shutil.copytree(self.place, self.keep)
            self.before = self.writer.state(self.place)
        self.outcomes, self.reruns, self.wrong = Counter[str](), Counter[str](), list[str]()
        self.restore()
        code = self.run(self.writer.write, {})
        if code != 0:
            raise RuntimeError(f"{name}: the writer itself ends with exit code {code}")
        self.points = len(self.log.read_text().splitlines())
        self.after, self.clean = self.writer.state(self.place), self.names()

    def restore(self) -> None:
        """The old output, and nothing else."""
        shutil.rmtree(self.parent, ignore_errors=True)
        self.parent.mkdir(parents=True)
        if self.before:
            shutil.copytree(self.keep, self.place)

    def names(self) -> list[str]:
        """Everything below the folder of the output, but the output's own files; without the hashes in names."""
        found = [path.relative_to(self.parent) for path in self.parent.rglob("*")]
        kept = (str(path) for path in found if path.parts[0] != self.place.name or path.name.startswith("."))
        return sorted(_HASH.sub(".HASH.", name) for name in kept)

    def run(self, write: Callable[[], None], settings: dict[str, str]) -> int:
        """The exit code of one more writing in a child, or minus its signal."""
        self.log.unlink(missing_ok=True)
        pid = os.fork()
        if pid == 0:
            os.environ |= {"FAULT_DIR": str(self.parent), "FAULT_LOG": str(self.log), **settings}
            _child(write, self.log.with_name("stderr"))
        return _waited(pid)

    def found(self) -> str:
        """What stands at the output: old, new or broken."""
        if not self.place.exists():
            return "old" if not self.before else "broken"
        try:
            state = self.writer.state(self.place)
        except Exception:  # noqa: BLE001 (whatever says so, it is not whole)
            return "broken"
        return "new" if state == self.after else "old" if state == self.before else "broken"

    def strike(self, what: str, number: int, settings: dict[str, str]) -> None:
        """One fault at one operation."""
        self.restore()
        code = self.run(self.writer.write, {"FAULT_N": str(number), **settings})
        if what == "power loss":
            lose_unsynced(self.log, self.parent)
        found, kept = self.found(), self.writer.kept
        left = sorted(
            name for name in self.names() if name.partition("/")[0] not in kept or "/." in name or "/tmp" in name
        )
        self.outcomes[f"{what}: {found}, exit {code}"] += 1
        tidy = code < 0 or not left
        if found == "broken" or not tidy or code not in EXPECTED[what]:
            said = "" if code < 0 else self.log.with_name("stderr").read_text(errors="replace")[-300:]
            self.wrong.append(f"{what} at {number} of {self.points}: {found}, exit {code}, beside it {left[:5]} {said}")
        elif code != 0 and number % self.rerun == 0:
            self._rerun(what, number)

    def _rerun(self, what: str, number: int) -> None:
        again = self.run(self.writer.again or self.writer.write, {})
        self.reruns[what] += 1
        found, names = self.found(), self.names()
        if again != 0 or names != self.clean or found != "new":
            said = self.log.with_name("stderr").read_text(errors="replace")[-300:]
            other = [name for name in {*names, *self.clean} if names.count(name) != self.clean.count(name)][:5]
            self.wrong.append(f"rerun after {what} at {number}: {found}, exit {again}, other names {other} {said}")


def campaign(
    name: str, seeds: Seeds, work: Path, *, most: int, rerun: int, end: float, kinds: set[str]
) -> dict[str, Any]:
    """Faults at up to `most` operations of a writer, until `end` (monotonic); the tally, and what was wrong."""
    strikes = Strikes(name, seeds, work, rerun)
    begin, points, struck = time.monotonic(), strikes.points, 0
    for number in spread(points, most):
        if time.monotonic() > end:
            break
        for what, settings in FAULTS.items():
            if what in kinds:
                strikes.strike(what, number, settings)
        struck += 1
    return {
        "operations": points,
        "operations_struck": struck,
        "struck": strikes.outcomes.total(),
        "reruns": dict(strikes.reruns),
        "outcomes": dict(sorted(strikes.outcomes.items())),
        "wrong": strikes.wrong,
        "seconds": round(time.monotonic() - begin, 1),
    }


def spread(points: int, most: int) -> list[int]:
    """Up to `most` of the numbers from 1 to `points`, evenly, so that an early end leaves none of the parts out."""
    count = min(most, points)
    chosen = sorted({1 + round(index * (points - 1) / max(1, count - 1)) for index in range(count)})
    strides = [chosen[first::8] for first in range(8)]
    return [number for stride in strides for number in stride]


def _child(write: Callable[[], None], stderr: Path) -> None:
    from optc.cli.common import guarded  # imported before by main

    null, said = os.open(os.devnull, os.O_WRONLY), os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(null, 1)
    os.dup2(said, 2)
    code = 70
    try:
        code = guarded(write, as_json=False)
    except SystemExit as done:
        code = done.code if isinstance(done.code, int) else 0
    finally:
        os._exit(code)


def _waited(pid: int) -> int:
    """The exit code of a child, or minus its signal; one that hangs is killed, which is reported as SIGALRM."""
    end = time.monotonic() + _LIMIT_SECONDS
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -int(signal.SIGALRM)


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


def figures(writers: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Those of all writers, and sums of the kinds of faults."""
    sums = Counter[str]()
    for row in writers.values():
        for outcome, count in row["outcomes"].items():
            sums[outcome.partition(":")[0]] += count
    reruns = sum(sum(row["reruns"].values()) for row in writers.values())
    wrong = sum(len(row["wrong"]) for row in writers.values())
    return {"seconds": round(seconds, 1), "struck": dict(sums), "reruns": reruns, "wrong": wrong, "writers": writers}


def main() -> int:
    """The command line; 1 where an output was not whole, or something lay beside it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--writers", default=",".join(name for name in WRITERS if name not in SLOW))
    parser.add_argument("--most", type=int, default=100, help="operations of each writer that are struck")
    parser.add_argument("--kinds", default=",".join(FAULTS), help="of faults")
    parser.add_argument("--rerun", type=int, default=7, help="run the writer again after every so many strike")
    parser.add_argument("--minutes", type=float, default=1e6, help="for each writer; operations are taken evenly")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    if "LD_PRELOAD" not in os.environ:
        os.environ["LD_PRELOAD"] = str(shim(work))
        os.environ["OMP_NUM_THREADS"] = "1"  # a forked child has no other threads
        os.execv(sys.executable, [sys.executable, "-m", "fuzz.disk", *sys.argv[1:]])
    if not LIGHT.issuperset(options.writers.split(",")):
        from fuzz.campaign import warm

        warm()
    import optc.cli.common  # noqa: F401 (once, for all children)

    begin, found = time.monotonic(), dict[str, Any]()
    for name in options.writers.split(","):
        end = time.monotonic() + 60 * options.minutes
        limits = {"most": options.most, "rerun": options.rerun, "end": end}
        kinds = set(options.kinds.split(","))
        found[name] = campaign(name, Seeds(work / "seeds"), work / name, kinds=kinds, **limits)
        print(f"{name}: {found[name]['struck']} faults at {found[name]['operations']} operations", flush=True)
        for row in (*sorted(found[name]["outcomes"].items()), *found[name]["wrong"][:20]):
            print("   ", row)
        if options.json:
            options.json.write_text(json.dumps(figures(found, time.monotonic() - begin), indent=1) + "\n")
    return 1 if any(row["wrong"] for row in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
