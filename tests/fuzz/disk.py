"""Kills, failing disks and power losses at every file operation of optc's writers: `make faults`, or

    python -m fuzz.disk --work /tmp/faults [--writers onnx,checkpoint] [--most 200] [--json FILE]

A writer is replayed in forked children over an old output; a library in front of the C library (`shim.c`) counts what it
does with files and strikes at one operation. Each time the output must be the old one or the new one, whole; after an
error nothing may lie beside it, and after a kill nothing once the writer has run again. A power loss is a kill after
which files that were written and not synced are empty, and their names stay: the harshest that a filesystem may do
(Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014). Needs a C compiler and Linux.
"""

from __future__ import annotations

import argparse
import errno
import hashlib
import json
import os
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

ERRORS = {"ENOSPC": (errno.ENOSPC, True), "EIO": (errno.EIO, False), "EIO for good": (errno.EIO, True)}


def shim(work: Path) -> Path:
    """The library, compiled."""
    place, source = work / "shim.so", Path(__file__).with_name("shim.c")
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-w", "-o", place, source, "-ldl"], check=True)
    return place


class Writer:
    """Something that is written to `place`, over and over.

    Args:
        write: writes it, once more. state: what it is, of equal outputs equal; raises of one that is not whole.
    """

    def __init__(self, place: Path, write: Callable[[], None], state: Callable[[Path], str]) -> None:
        self.place, self.write, self.state = place, write, state


def artifact_writer(seeds: Seeds, work: Path, *target: str) -> Writer:
    """The last part of a compile: export, check, manifest, publishing."""
    import optc.api as api
    from optc.cli.main import main
    from optc.compiler.artifact.folder import verify

    place, got = work / "place" / "output", []
    place.parent.mkdir(parents=True, exist_ok=True)
    real = api._write
    api._write = lambda *given: (got.append(given), real(*given))[1]  # type: ignore[assignment]
    try:
        main(["compile", str(seeds.model()), *target, "-o", str(place), "--force"])
    except SystemExit as done:
        if done.code not in (0, None):
            raise RuntimeError(f"the compile ended with {done.code}") from done
    finally:
        api._write = real

    def state(folder: Path) -> str:
        entries = verify(folder).files
        return json.dumps([entry.sha256 for entry in entries if entry.path != "report.html"])

    return Writer(place, lambda: got and real(*got[0]), state)  # type: ignore[func-returns-value]


def checkpoint_writer(seeds: Seeds, work: Path) -> Writer:
    """A checkpoint of a training run; there is no old one in its place."""
    import torch

    from optc.training import checkpoint
    from optc.training.data import Position

    run = work / "place"
    run.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.LayerNorm(64))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 64)).sum().backward()
    optimizer.step()
    given = checkpoint.RunState(step=1, position=Position(), model="m", corpus="c", config={}, run="r")

    def state(folder: Path) -> str:
        checkpoint.check_whole(folder)
        return hashlib.sha256((folder / "SHA256SUMS").read_bytes()).hexdigest()

    return Writer(
        run / "checkpoints" / "step-00000001",
        lambda: checkpoint.save(run, given, model, optimizer, keep=2) and None,
        state,
    )


WRITERS: dict[str, Callable[[Seeds, Path], Writer]] = {
    "onnx": lambda seeds, work: artifact_writer(seeds, work, "--target", "onnx-cpu"),
    "folder": lambda seeds, work: artifact_writer(seeds, work, "--target", "vllm"),
    "checkpoint": checkpoint_writer,
}


def campaign(name: str, seeds: Seeds, work: Path, most: int) -> dict[str, Any]:
    """Every fault at up to `most` operations of a writer; the tally of outcomes, and what was wrong."""
    shutil.rmtree(work, ignore_errors=True)
    writer = WRITERS[name](seeds, work)
    old, keep = writer.place.exists(), work / "old"
    if old:
        shutil.copytree(writer.place, keep)
    before = writer.state(writer.place) if old else ""

    def restore() -> None:
        shutil.rmtree(writer.place.parent, ignore_errors=True)
        writer.place.parent.mkdir(parents=True)
        if old:
            shutil.copytree(keep, writer.place)

    log, outcomes, wrong = work / "operations.log", Counter[str](), []
    restore()
    assert _run(writer, {"FAULT_DIR": str(writer.place.parent), "FAULT_LOG": str(log)}) == 0
    after, points = writer.state(writer.place), len(log.read_text().splitlines())
    chosen = range(1, points + 1, max(1, points // most))

    def strike(what: str, number: int, settings: dict[str, str]) -> None:
        restore()
        log.unlink(missing_ok=True)
        place = {"FAULT_DIR": str(writer.place.parent), "FAULT_LOG": str(log), "FAULT_N": str(number)}
        code = _run(writer, {**place, **settings})
        if what == "power loss":
            _lose_unsynced(log, writer.place.parent)
        found = _state(writer, before, after)
        left = [path.name for path in writer.place.parent.iterdir() if path != writer.place]
        outcomes[f"{what}: {found}, exit {code}"] += 1
        tidy = not left if code >= 0 else True
        expected = {"ENOSPC": (8, 0), "EIO": (3, 0), "EIO for good": (3, 0), "short write": (0,)}.get(what, (-9,))
        if found == "broken" or not tidy or code not in expected:
            wrong.append(f"{what} at {number} of {points}: {found}, exit {code}, beside it {left}")
        elif code < 0 and number % 7 == 0:
            again = _run(writer, {})
            left = [path.name for path in writer.place.parent.iterdir() if path != writer.place]
            is_checkpoint = name == "checkpoint" and found == "new"  # which is not written twice
            if (again != 0 and not is_checkpoint) or left or _state(writer, before, after) != "new":
                wrong.append(f"rerun after {what} at {number}: exit {again}, beside it {left}")

    for number in chosen:
        strike("kill", number, {"FAULT_KIND": "kill"})
        strike("power loss", number, {"FAULT_KIND": "kill"})
        strike("short write", number, {"FAULT_KIND": "short"})
        for what, (code, for_good) in ERRORS.items():
            strike(what, number, {"FAULT_KIND": str(code)} | ({"FAULT_STICKY": "1"} if for_good else {}))
    return {"operations": points, "struck": sum(outcomes.values()), "outcomes": dict(outcomes), "wrong": wrong}


def _state(writer: Writer, before: str, after: str) -> str:
    if not writer.place.exists():
        return "old" if not before else "broken"
    try:
        found = writer.state(writer.place)
    except Exception:  # noqa: BLE001 (whatever says so, it is not whole)
        return "broken"
    return "new" if found == after else "old" if found == before else "broken"


def _run(writer: Writer, settings: dict[str, str]) -> int:
    """The exit code of one more writing in a child, or minus its signal."""
    pid = os.fork()
    if pid == 0:
        from optc.cli.common import guarded

        os.environ.update(settings)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        try:
            os._exit(guarded(writer.write, as_json=False))
        finally:
            os._exit(70)
    signal.alarm(120)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    signal.alarm(0)
    return code


def _lose_unsynced(log: Path, folder: Path) -> None:
    """Empty the files whose last write was not followed by a sync."""
    dirty = set()
    for line in log.read_text().splitlines():
        operation, inode, _ = line.split(" ", 2)
        if operation == "write":
            dirty.add(int(inode))
        elif operation == "fsync":
            dirty.discard(int(inode))
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and path.stat().st_ino in dirty:
            os.truncate(path, 0)


def main() -> int:
    """The command line; 1 where an output was not whole, or something lay beside it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--writers", default=",".join(WRITERS))
    parser.add_argument("--most", type=int, default=100, help="operations of each writer that are struck")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    if "LD_PRELOAD" not in os.environ:
        os.environ["LD_PRELOAD"] = str(shim(work))
        os.environ["OMP_NUM_THREADS"] = "1"  # a forked child has no other threads
        os.execv(sys.executable, [sys.executable, "-m", "fuzz.disk", *sys.argv[1:]])
    if options.writers != "checkpoint":
        from fuzz.campaign import warm

        warm()
    begin, found = time.monotonic(), {}
    for name in options.writers.split(","):
        found[name] = campaign(name, Seeds(work / "seeds"), work / name, options.most)
        print(f"{name}: {found[name]['struck']} faults at {found[name]['operations']} operations", flush=True)
        for row in (*sorted(found[name]["outcomes"].items()), *found[name]["wrong"][:20]):
            print("   ", row)
    result = {"seconds": round(time.monotonic() - begin, 1), "writers": found}
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if any(row["wrong"] for row in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
