"""The zoo: every text type of the installed transformers, and some of pictures, tiny and random, compiled and held to its own
eager forward.

    python benchmarks/zoo.py --stage capture                    # capture alone, a quarter of an hour
    python benchmarks/zoo.py --stage onnx-cpu [--only GLOB ...]
    python benchmarks/zoo.py --stage onnx-cpu inductor-cpu --jobs 15 --minutes 8    # the rest is for the next run
    python benchmarks/zoo.py --merge other.json                 # take rows that another machine made
    python benchmarks/zoo.py --again crashed wrong              # those rows once more
    python benchmarks/zoo.py --before 2026-12-01 --quick-first  # rows that are older; what took least time first
    python benchmarks/zoo.py --docs                             # only write docs/models.md anew

Each type runs in a forked child with limits of time and memory; what several stages need is done once. Rows go to
benchmarks/results/zoo.json as they come, each with its commit and versions, and what stands there already is not run
again. Outcomes: exact (outputs within 1e-4 of the largest, greedy tokens equal); uncached (the same by --kv-cache none,
where the target's own cache does not fit, with the reason); refused (exit 2, 3, 4 or 6, with the reason); gate (exit 5:
other numbers were computed, which the numerics gate noticed); wrong (other numbers without a word); crashed; hung; not
built (transformers itself makes, saves or runs no small one).
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common import RESULTS, ROOT, commit
from zoo_models import Kind, kinds
from zoo_pictures import other_kinds

FILE = RESULTS / "zoo.json"
DOCS = ROOT / "docs" / "models.md"
STAGES = ("capture", "onnx-cpu", "inductor-cpu")
# -- children --------------------------------------------------------------------------------------


@dataclass
class _Child:
    """A process that examines one type; it sends its rows as lines, and has `seconds` for each."""

    kind: Kind
    stages: list[str]
    slot: int
    pid: int
    pipe: int
    folder: Path
    deadline: float
    data: bytes = b""


def _start(kind: Kind, stages: list[str], limits: Limits, slot: int) -> _Child:
    folder = Path(tempfile.mkdtemp(prefix="zoo-"))
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        _examine(kind, stages, folder, write, limits, slot)
    os.close(write)
    return _Child(kind, list(stages), slot, pid, read, folder, time.monotonic() + limits.seconds)


def _examine(kind: Kind, stages: list[str], folder: Path, write: int, limits: Limits, slot: int) -> None:
    """In the child: write the rows to the pipe, and end without what the parent would do at its end."""
    code = 1
    try:
        os.setsid()
        _keep_to_own_cores(slot, limits.jobs)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + int(limits.memory_gb * 2**30),) * 2)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        from zoo_examine import examine

        for row in examine(kind, stages, folder, limits.seconds / 3):
            os.write(write, json.dumps(row).encode() + b"\n")
        code = 0
    finally:
        os._exit(code)


def _keep_to_own_cores(slot: int, jobs: int) -> None:
    """A share of the cores for each child: thread pools of engines are as wide as the machine, and would get in each
    other's way."""
    import torch

    cores = sorted(os.sched_getaffinity(0))
    share = max(1, len(cores) // jobs)
    first = slot * share % len(cores)
    os.sched_setaffinity(0, cores[first : first + share])
    torch.set_num_threads(share)


def _take_rows(child: _Child, data: bytes, seconds: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows that are complete now."""
    *lines, child.data = (child.data + data).split(b"\n")
    for line in lines:
        stage, row = json.loads(line)
        child.stages.remove(stage)
        child.deadline = time.monotonic() + seconds
        yield stage, row


def _finish(child: _Child, *, hung: bool, seconds: float) -> dict[str, Any]:
    """Clean up behind a child; the row of the stage that it did not come through."""
    if hung:
        os.killpg(child.pid, signal.SIGKILL)
    _, status = os.waitpid(child.pid, 0)
    os.close(child.pipe)
    shutil.rmtree(child.folder, ignore_errors=True)
    if hung:
        return {"outcome": "hung", "reason": f"no end in {seconds:g} s"}
    how = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}"
    return {"outcome": "crashed", "reason": f"the process ended: {how}"}


def run(waiting: list[tuple[Kind, list[str]]], limits: Limits, results: Results) -> None:
    """Examine each type in its stages, some at a time; rows are written as they come."""
    begin, running = time.monotonic(), list[_Child]()

    def put(kind: Kind, stage: str, row: dict[str, Any]) -> None:
        results.put(stage, kind, row)
        print(f"{kind.name} {stage}: {row['outcome']} {row.get('reason', '')}"[:200], flush=True)

    while waiting or running:
        if time.monotonic() - begin > limits.minutes * 60:
            waiting.clear()
        while waiting and len(running) < limits.jobs:
            slot = min(set(range(limits.jobs)) - {child.slot for child in running})
            running.append(_start(*waiting.pop(0), limits, slot))
        ready, _, _ = select.select([child.pipe for child in running], [], [], 1.0)
        for child in list(running):
            data = os.read(child.pipe, 1 << 16) if child.pipe in ready else None
            for stage, row in _take_rows(child, data or b"", limits.seconds):
                put(child.kind, stage, row)
            hung = time.monotonic() > child.deadline
            if data == b"" or hung:
                running.remove(child)
                row = _finish(child, hung=hung, seconds=limits.seconds)
                if child.stages:  # stages behind it are for another run
                    put(child.kind, child.stages[0], row)


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
        self.rows(stage)[kind.name] = {"architecture": kind.architecture, **row, **self.made_by}
        self.write()

    @functools.cached_property
    def made_by(self) -> dict[str, str]:
        """What each row says of where it comes from."""
        import torch
        import transformers

        return {
            "commit": commit(),
            "date": datetime.now(UTC).date().isoformat(),
            "torch": torch.__version__.split("+")[0],
            "transformers": transformers.__version__,
        }

    def merge(self, other: Results) -> None:
        """Take rows of another file in place of those that stand here."""
        for stage, rows in other.stages.items():
            self.rows(stage).update(rows)
        self.write()

    def write(self) -> None:
        for stage in self.stages:
            self.stages[stage] = dict(sorted(self.rows(stage).items()))
        self.data["date"] = datetime.now(UTC).isoformat(timespec="seconds")
        self.file.parent.mkdir(parents=True, exist_ok=True)
        part = self.file.with_suffix(".part")
        part.write_text(json.dumps(self.data, indent=1, sort_keys=True) + "\n")
        part.replace(self.file)


@dataclass(frozen=True)
class Limits:
    """Of one type: seconds for each stage, and memory beyond the parent's. Of the run: children at once, and minutes after
    which none is started."""

    jobs: int
    seconds: float
    memory_gb: float
    minutes: float


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=["capture"])
    parser.add_argument("--only", nargs="+", metavar="GLOB", help="types as head:type, such as causal:gpt* or *:bert")
    parser.add_argument(
        "--again", nargs="+", default=(), metavar="OUTCOME", help="run rows of these outcomes again; all"
    )
    parser.add_argument("--before", default="", metavar="DATE", help="run rows that are older again: 2026-12-01")
    parser.add_argument("--quick-first", action="store_true", help="in the order of what types took, new ones first")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=180.0, help="limit of one stage of one type")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no type after this time")
    parser.add_argument("--memory-gb", type=float, default=8.0, help="limit of one type, beyond the parent's")
    parser.add_argument("--file", type=Path, default=FILE)
    parser.add_argument("--merge", nargs="+", type=Path, default=(), metavar="FILE", help="take rows, and run nothing")
    parser.add_argument("--docs", action="store_true", help="write docs/models.md from the file, and run nothing")
    return parser


def main() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # both targets are the CPU's, and a forked child cannot use the GPU
    arguments = _parser().parse_args()
    results = Results(arguments.file)
    for other in arguments.merge:
        results.merge(Results(other))
    if not arguments.docs and not arguments.merge:
        _import_for(arguments.stage)
        limits = Limits(arguments.jobs, arguments.seconds, arguments.memory_gb, arguments.minutes)
        run(_left(arguments, results), limits, results)
    if arguments.file == FILE:
        from zoo_table import write_docs

        write_docs(results.data, DOCS)


def _import_for(stages: Sequence[str]) -> None:
    """Children are forked: what they all import is imported before."""
    import zoo_examine  # noqa: F401

    import optc.api  # noqa: F401

    if "onnx-cpu" in stages:
        import onnxruntime  # noqa: F401
    if "inductor-cpu" in stages:
        os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no pool of compilers behind each child
        import torch._inductor.compile_fx  # noqa: F401

        from optc.compiler.kernels.cpu.library import build_library
        from optc.compiler.kernels.kernel import kernels_for

        build_library(kernels_for("cpu"))  # with all cores; a child has few


def _left(arguments: argparse.Namespace, results: Results) -> list[tuple[Kind, list[str]]]:
    """The chosen types with the stages of which they have no row, or one that is to be made again."""
    chosen = [kind for kind in (*kinds(), *other_kinds()) if _is_chosen(kind, arguments.only)]
    if arguments.only and not chosen:
        sys.exit(f"no type is called {' or '.join(arguments.only)}")

    def is_left(kind: Kind, stage: str) -> bool:
        row = results.rows(stage).get(kind.name)
        if row is None or row.get("date", "") < arguments.before:
            return True
        return row["outcome"] in arguments.again or "all" in arguments.again

    def seconds(kind: Kind) -> float:
        return sum(results.rows(stage).get(kind.name, {}).get("seconds", 0.0) for stage in arguments.stage)

    chosen.sort(key=lambda kind: zlib.crc32(kind.name.encode()))  # whatever a run comes to is a fair sample
    if arguments.quick_first:
        chosen.sort(key=seconds)
    left = [(kind, [stage for stage in arguments.stage if is_left(kind, stage)]) for kind in chosen]
    return [(kind, stages) for kind, stages in left if stages]


def _is_chosen(kind: Kind, globs: Sequence[str] | None) -> bool:
    return not globs or any(fnmatch.fnmatch(kind.name, glob) for glob in globs)


if __name__ == "__main__":
    main()
