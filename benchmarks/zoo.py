"""The zoo: every text type of the installed transformers, tiny and random, compiled and held to its own eager forward.

    python benchmarks/zoo.py --stage capture                    # capture alone, a quarter of an hour
    python benchmarks/zoo.py --stage onnx-cpu [--only GLOB ...]
    python benchmarks/zoo.py --stage inductor-cpu --jobs 2
    python benchmarks/zoo.py --again crashed wrong              # those rows once more
    python benchmarks/zoo.py --docs                             # only write docs/models.md anew

Each type runs in a forked child with limits of time and memory. Rows go to benchmarks/results/zoo.json as they come, and
what stands there already is not run again. Outcomes: exact (outputs within 1e-4 of the largest, greedy tokens equal);
refused (exit 2, 3, 4 or 6, with the reason); gate (exit 5: other numbers were computed, which the numerics gate noticed);
wrong (other numbers without a word); crashed; hung; not built (transformers itself makes, saves or runs no small one).
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, commit
from zoo_models import Kind, kinds

FILE = RESULTS / "zoo.json"
DOCS = ROOT / "docs" / "models.md"
STAGES = ("capture", "onnx-cpu", "inductor-cpu")
OUTCOMES = ("exact", "refused", "gate", "wrong", "crashed", "hung")
"""Of the types that can be built, best first."""


# -- children --------------------------------------------------------------------------------------


@dataclass
class _Child:
    kind: Kind
    pid: int
    pipe: int
    folder: Path
    deadline: float
    data: bytes = b""


def _start(kind: Kind, stage: str, seconds: float, memory_gb: float) -> _Child:
    folder = Path(tempfile.mkdtemp(prefix="zoo-"))
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        _examine(kind, stage, folder, write, seconds, memory_gb)
    os.close(write)
    return _Child(kind, pid, read, folder, time.monotonic() + seconds)


def _examine(kind: Kind, stage: str, folder: Path, write: int, seconds: float, memory_gb: float) -> None:
    """In the child: write the row to the pipe, and end without what the parent would do at its end."""
    code = 1
    try:
        os.setsid()
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + int(memory_gb * 2**30),) * 2)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        from zoo_examine import examine

        row = examine(kind, stage, folder, seconds / 3)
        os.write(write, json.dumps(row).encode())
        code = 0
    finally:
        os._exit(code)


def _finish(child: _Child, *, hung: bool, seconds: float) -> dict[str, Any]:
    if hung:
        os.killpg(child.pid, signal.SIGKILL)
    _, status = os.waitpid(child.pid, 0)
    os.close(child.pipe)
    shutil.rmtree(child.folder, ignore_errors=True)
    if hung:
        return {"outcome": "hung", "reason": f"no end in {seconds:g} s"}
    if not child.data:
        how = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}"
        return {"outcome": "crashed", "reason": f"the process ended: {how}"}
    row: dict[str, Any] = json.loads(child.data)
    return row


def run(chosen: Sequence[Kind], stage: str, jobs: int, seconds: float, memory_gb: float, results: Results) -> None:
    """Examine each type, `jobs` at a time; rows are written as they come."""
    waiting, running = list(chosen), list[_Child]()
    while waiting or running:
        while waiting and len(running) < jobs:
            running.append(_start(waiting.pop(0), stage, seconds, memory_gb))
        ready, _, _ = select.select([child.pipe for child in running], [], [], 1.0)
        for child in list(running):
            data = os.read(child.pipe, 1 << 16) if child.pipe in ready else None
            child.data += data or b""
            hung = time.monotonic() > child.deadline
            if data == b"" or hung:
                running.remove(child)
                row = _finish(child, hung=hung, seconds=seconds)
                results.put(stage, child.kind, row)
                print(f"{child.kind.name}: {row['outcome']} {row.get('reason', '')}"[:200], flush=True)


# -- results ---------------------------------------------------------------------------------------


class Results:
    """The rows of benchmarks/results/zoo.json: stage -> type -> row."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.data: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"benchmark": "zoo"}
        self.stages: dict[str, dict[str, Any]] = self.data.setdefault("stages", {})

    def rows(self, stage: str) -> dict[str, Any]:
        rows: dict[str, Any] = self.stages.setdefault(stage, {})
        return rows

    def put(self, stage: str, kind: Kind, row: dict[str, Any]) -> None:
        import torch
        import transformers

        self.rows(stage)[kind.name] = {"architecture": kind.architecture, **row}
        self.stages[stage] = dict(sorted(self.rows(stage).items()))
        self.data |= {"transformers": transformers.__version__, "torch": torch.__version__.split("+")[0]}
        self.data |= {"date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit()}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(self.data, indent=1, sort_keys=True) + "\n")
        part.replace(self.file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=STAGES, default="capture")
    parser.add_argument("--only", nargs="+", metavar="GLOB", help="types as head:type, such as causal:gpt* or *:bert")
    parser.add_argument(
        "--again", nargs="+", default=(), metavar="OUTCOME", help="run rows of these outcomes again; all"
    )
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=180.0, help="limit of one type")
    parser.add_argument("--memory-gb", type=float, default=8.0, help="limit of one type, beyond the parent's")
    parser.add_argument("--file", type=Path, default=FILE)
    parser.add_argument("--docs", action="store_true", help="write docs/models.md from the file, and run nothing")
    arguments = parser.parse_args()
    results = Results(arguments.file)
    if not arguments.docs:
        # Children are forked: everything is imported before.
        import zoo_examine  # noqa: F401

        import optc.api  # noqa: F401

        done = {
            name
            for name, row in results.rows(arguments.stage).items()
            if row["outcome"] not in arguments.again and "all" not in arguments.again
        }
        chosen = [kind for kind in kinds() if _is_chosen(kind, arguments.only) and kind.name not in done]
        if arguments.only and not any(_is_chosen(kind, arguments.only) for kind in kinds()):
            sys.exit(f"no type is called {' or '.join(arguments.only)}")
        run(chosen, arguments.stage, arguments.jobs, arguments.seconds, arguments.memory_gb, results)
    if arguments.file == FILE:
        from zoo_table import write_docs

        write_docs(results.data, DOCS)


def _is_chosen(kind: Kind, globs: Sequence[str] | None) -> bool:
    return not globs or any(fnmatch.fnmatch(kind.name, glob) for glob in globs)


if __name__ == "__main__":
    main()
