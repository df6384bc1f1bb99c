"""Kills, failing disks and power losses at every file operation of optc's writers: `make faults`, or

    python -m fuzz.disk --work /tmp/faults [--jobs 2] [--writers onnx,checkpoint] [--most 200] [--json FILE]
    PYTHONPATH=$PWD/src:$PWD/tests python -m fuzz.disk --work /dev/shm/faults --jobs 16 --rerun 1 --minutes 8.5 --json FILE

The second one is a complete run: every kind at every operation, and each time a rerun, in a folder in memory. It ends in
time, and keeps the figures of what it came to; FILE is written anew every few seconds.

A writer is replayed in forked children over an old output; a library in front of the C library (`shim.c`) counts what it
does with files and strikes at one operation. Each time the output must be the old one or the new one, whole; after an
error nothing may lie beside it, and after a kill nothing once the writer has run again. A power loss is a kill after
which files hold what they held when they were synced last, nothing if never, and their names stay: the harshest that a
filesystem may do (Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014). Needs a C compiler and Linux.

Every writer has a process, which makes it ready once, up to the part that writes; its strikes are forks of that process,
in folders of their own, as many at a time as there are jobs.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter, defaultdict, deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fuzz.seeds import Seeds
from fuzz.strikes import FAULTS, Striker, end_with_parent, spread
from fuzz.tally import write_whole
from fuzz.writer import keep_templates
from fuzz.writers import WRITERS

_LIMIT_SECONDS = 300.0  # of one writing, on a machine that may be loaded
_POLL_SECONDS = 0.005


def shim(work: Path) -> Path:
    """The library, compiled."""
    place, source = work / "shim.so", Path(__file__).with_name("shim.c")
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-w", "-o", place, source, "-ldl"], check=True)
    return place


class Jobs:
    """Leave to work, as often at a time as there are jobs, of this process and its forks: bytes in a pipe."""

    def __init__(self, count: int, end: float) -> None:
        self.count, self.end = count, end
        self._out, self._in = os.pipe()
        os.set_blocking(self._out, False)
        os.write(self._in, b"j" * count)

    def take(self, seconds: float = 0.0) -> bool:
        """Wait up to so many seconds."""
        if not select.select([self._out], [], [], seconds)[0]:
            return False
        try:
            return bool(os.read(self._out, 1))
        except BlockingIOError:  # another process was faster
            return False

    def give(self) -> None:
        """Give it back."""
        os.write(self._in, b"j")

    @contextmanager
    def taken(self) -> Iterator[bool]:
        """One, for a block; False where the time is over before there is one."""
        found = False
        while not found and time.monotonic() < self.end:
            found = self.take(1.0)
        try:
            yield found
        finally:
            if found:
                self.give()


class Rows:
    """What the processes of a writer tell: lines of a file that they share."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.unlink(missing_ok=True)
        path.touch()

    def add(self, row: dict[str, Any]) -> None:
        """Append one, in one write."""
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        os.write(handle, json.dumps(row).encode() + b"\n")
        os.close(handle)

    def read(self) -> list[dict[str, Any]]:
        """All there are."""
        return [json.loads(line) for line in self.path.read_text().splitlines()]


def strike_writer(name: str, work: Path, jobs: Jobs, rows: Rows, options: argparse.Namespace) -> None:
    """All strikes of a writer, each in a process of its own."""
    folder, begin = work / name, time.monotonic()
    with jobs.taken() as in_time:
        if not in_time:
            return
        keep_templates()
        writer = WRITERS[name].make(Seeds(work / "seeds"), folder)
        striker = Striker(name, writer, folder / "0")
    rows.add({"operations": striker.points, "setup_s": round(time.monotonic() - begin, 1)})
    kinds = [kind for kind in FAULTS if kind in options.kinds.split(",")]
    numbers = spread(striker.points, options.most)
    left = deque((number, kind) for number in numbers for kind in kinds)
    running, free = dict[int, Running](), set(range(jobs.count))
    while left or running:
        if time.monotonic() > jobs.end:
            left.clear()
        done, status = os.waitpid(-1, os.WNOHANG) if running else (0, 0)
        if done:
            one = running.pop(done)
            if not one.went_on(os.waitstatus_to_exitcode(status), rows):
                free.add(one.slot)
                jobs.give()
                time.sleep(2 * _POLL_SECONDS)  # other writers are waiting too
            else:
                running[one.pid] = one
        elif left and free and jobs.take():
            number, kind = left.popleft()
            slot = free.pop()
            one = Running(slot, striker.moved(folder / str(slot)).strike(kind, number, number % options.rerun == 0))
            running[one.pid] = one
        else:
            for one in running.values():
                one.end_in_time()
            time.sleep(_POLL_SECONDS)


class Running:
    """A strike under way.

    Attributes:
        slot: of the places at a time. pid: of the child that it waits for.
    """

    def __init__(self, slot: int, strike: Generator[int, int, dict[str, Any]]) -> None:
        self.slot, self._strike = slot, strike
        self._wait_for(next(strike))

    def _wait_for(self, pid: int) -> None:
        self.pid, self._begin, self._overdue = pid, time.monotonic(), False

    def went_on(self, code: int, rows: Rows) -> bool:
        """Whether there is another child, after one that has ended so; its row is told otherwise."""
        try:
            self._wait_for(self._strike.send(-int(signal.SIGALRM) if self._overdue else code))
        except StopIteration as done:
            rows.add(done.value)
            return False
        return True

    def end_in_time(self) -> None:
        """Kill a child that hangs; it is reported as one that died of SIGALRM."""
        if time.monotonic() > self._begin + _LIMIT_SECONDS and not self._overdue:
            self._overdue = True
            os.killpg(self.pid, signal.SIGKILL)


def start(name: str, work: Path, jobs: Jobs, rows: Rows, options: argparse.Namespace) -> int:
    """The process of a writer; what it prints goes into a file."""
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            end_with_parent()
            shutil.rmtree(work / name, ignore_errors=True)
            (work / name / "tmp").mkdir(parents=True, exist_ok=True)
            said = os.open(work / name / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
            os.dup2(said, 1)
            os.dup2(said, 2)
            faulthandler.enable(said, all_threads=True)
            cache = {"TORCHINDUCTOR_CACHE_DIR": str(work / name / "inductor")}
            os.environ |= {"TMPDIR": str(work / name / "tmp"), **cache}
            strike_writer(name, work, jobs, rows, options)
            code = 0
        except BaseException as error:  # noqa: BLE001 (told as a failure of the campaign)
            said = "".join(traceback.format_exception(error))
            rows.add(
                {"wrong": f"not struck: the writer could not be made ready: {error!r}"[:300], "trace": _ends(said)}
            )
        finally:
            sys.stderr.flush()
            os._exit(code)
    return pid


def tally(rows: Iterable[dict[str, Any]], kinds: int) -> dict[str, Any]:
    """Figures of a writer."""
    outcomes, reruns, kinds_of = Counter[str](), Counter[str](), defaultdict[int, set[str]](set)
    found: dict[str, Any] = {"operations": 0, "operations_struck": 0, "struck": 0}
    wrong, traces, seconds = list[str](), list[str](), 0.0
    for row in rows:
        wrong += [row["wrong"]] if "wrong" in row else []
        traces += [row["trace"]] if "trace" in row else []
        if "operations" in row:
            found |= row
        if "outcome" in row:
            outcomes[row["outcome"]] += 1
            reruns[row["kind"]] += row.get("rerun", False)
            kinds_of[row["number"]].add(row["kind"])
            seconds += row["seconds"]
    return {
        **found,
        "operations_struck": sum(len(struck) == kinds for struck in kinds_of.values()),
        "struck": outcomes.total(),
        "reruns": {kind: count for kind, count in reruns.items() if count},
        "outcomes": dict(sorted(outcomes.items())),
        "wrong": wrong,
        **({"traces": traces} if traces else {}),
        "seconds": round(seconds, 1),
    }


def _ends(text: str) -> str:
    """Beginning and end of what a writer said: of a signal the first line, of an exception the last."""
    return text if len(text) <= 6000 else f"{text[:3000]}\n...\n{text[-3000:]}"


def figures(writers: dict[str, Any], seconds: float, jobs: int) -> dict[str, Any]:
    """Those of all writers, and sums of the kinds of faults."""
    sums = Counter[str]()
    ran = [row for row in writers.values() if "skipped" not in row]
    for row in ran:
        for outcome, count in row["outcomes"].items():
            sums[outcome.partition(":")[0]] += count
    return {
        "seconds": round(seconds, 1),
        "jobs": jobs,
        "operations": sum(row["operations"] for row in ran),
        "operations_struck": sum(row["operations_struck"] for row in ran),
        "struck": dict(sums),
        "reruns": sum(sum(row["reruns"].values()) for row in ran),
        "wrong": sum(len(row["wrong"]) for row in ran),
        "writers": writers,
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder; one on a disk in memory is faster")
    parser.add_argument("--writers", default=",".join(WRITERS))
    parser.add_argument("--jobs", type=int, default=1, help="strikes at a time, over all writers")
    parser.add_argument("--most", type=int, default=1 << 30, help="operations of each writer that are struck")
    parser.add_argument("--kinds", default=",".join(FAULTS), help="of faults")
    parser.add_argument("--rerun", type=int, default=7, help="run the writer again at every so many operation")
    parser.add_argument("--minutes", type=float, default=1e6, help="no strike begins after this time")
    parser.add_argument("--json", type=Path, help="write the figures here, every few seconds")
    return parser.parse_args()


def _write(path: Path | None, found: dict[str, Any]) -> None:
    if path is not None:
        write_whole(path, json.dumps(found, indent=1) + "\n")


def campaign(names: list[str], work: Path, options: argparse.Namespace, begin: float) -> dict[str, Any]:
    """Strike writers side by side; figures are written as they come."""
    jobs, kinds = Jobs(options.jobs, begin + 60 * options.minutes), len(options.kinds.split(","))
    skipped = {name: {"skipped": why} for name in names if (why := WRITERS[name].missing())}
    rows = {name: Rows(work / f"{name}.rows") for name in names if name not in skipped}
    running = {start(name, work, jobs, rows[name], options): name for name in rows}

    def found() -> dict[str, Any]:
        writers = {name: skipped.get(name) or tally(rows[name].read(), kinds) for name in names}
        return figures(writers, time.monotonic() - begin, options.jobs)

    told = time.monotonic()
    while running:
        done, status = os.waitpid(-1, os.WNOHANG)
        if done:
            name = running.pop(done)
            if os.WIFSIGNALED(status):
                unstruck = not tally(rows[name].read(), kinds)["operations"]
                how = f"{'not struck: ' * unstruck}the writer died by signal {os.WTERMSIG(status)}"
                rows[name].add({"wrong": how, "trace": _ends((work / name / "said").read_text(errors="replace"))})
                if unstruck:
                    jobs.give()  # it had leave to make itself ready
            print(f"{time.monotonic() - begin:.0f} s: {name} done", flush=True)
        if time.monotonic() > told + 5:
            _write(options.json, found())
            told = time.monotonic()
        time.sleep(0.05)
    result = found()
    _write(options.json, result)
    return result


def _show(result: dict[str, Any]) -> None:
    for name, row in result["writers"].items():
        if "skipped" in row:
            print(f"{name}: skipped, {row['skipped']}")
            continue
        print(f"{name}: {row['struck']} faults at {row['operations_struck']} of {row['operations']} operations")
        for line in (*row["outcomes"].items(), *row["wrong"][:20], *row.get("traces", ())):
            print("   ", line)
    print(f"{sum(result['struck'].values())} faults, {result['wrong']} wrong, {result['seconds']:.0f} s")


def main() -> int:
    """The command line; 1 where an output was not whole, or something lay beside it."""
    options, begin = _options(), time.monotonic()
    work = options.work.resolve()
    (work / "tmp").mkdir(parents=True, exist_ok=True)
    if "LD_PRELOAD" not in os.environ:
        home = {f"XDG_{kind}_HOME": str(work / "home" / kind.lower()) for kind in ("STATE", "CACHE", "CONFIG")}
        os.environ |= {"LD_PRELOAD": str(shim(work)), "TMPDIR": str(work / "tmp"), "HF_HUB_OFFLINE": "1", **home}
        os.environ["OMP_NUM_THREADS"] = "1"  # a forked child has no other threads
        os.execv(sys.executable, [sys.executable, "-m", "fuzz.disk", *sys.argv[1:]])
    names = options.writers.split(",")
    if not all(WRITERS[name].light for name in names):
        from fuzz.campaign import warm

        warm()
    import optc.cli.common  # noqa: F401 (once, for all children)

    result = campaign(names, work, options, begin)
    _show(result)
    return 1 if result["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
