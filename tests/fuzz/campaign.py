"""A fuzzing campaign over all readers, in children that may die: `make fuzz`, or

    python -m fuzz.campaign --seconds 60 --work /tmp/fuzz [--jobs 2] [--readers Header,Onnx] [--json FILE] [--keep CORPUS]
    python -m fuzz.campaign --inputs 10000000 --minutes 9 --jobs 16 --work /tmp/fuzz --json FILE [--add EARLIER]

Each child reads inputs of one reader for some seconds (`child.py`), and another seed's next time; the readers take
turns. A child's death, and one input of more than 10 s of CPU time or 120 s of waiting, are counted as faults, and the
next child goes on. FILE is written every few seconds.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import itertools
import json
import os
import selectors
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from fuzz.beside import ArrayFile, DatasetFolder, Drafts
from fuzz.child import RESTART, Shared, outcome, own_threads, run_inputs
from fuzz.readers import CHEAP, Reader, by_name
from fuzz.seeds import Seeds
from fuzz.sentence import SentenceFolder
from fuzz.tally import Tally, figures, write_whole
from fuzz.texts import TEXTS
from fuzz.trained import ShardedCheckpoint
from fuzz.whole import WHOLE

READERS = by_name((*CHEAP, *TEXTS, *WHOLE, SentenceFolder, Drafts, ArrayFile, DatasetFolder, ShardedCheckpoint))
_BATCH_SECONDS = 20.0  # of one child
_GRACE_SECONDS = 15.0  # behind the campaign's end, for children that are busy
_TOLD_SECONDS = 5.0


class Child:
    """A process that reads inputs of one reader.

    Args:
        slot: which of the places at a time; no two children have the same.
    """

    def __init__(self, name: str, seeds: Seeds, slot: int, seconds: float, seed: int) -> None:
        self.name, self.slot, self.seconds, self.overdue, self.told = name, slot, seconds, "", 0
        self.shared, self.begin = Shared(), time.monotonic()
        self.error = seeds.folder / f"error-{name}-{slot}"
        self._buffer = b""
        self.pipe, write_end = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            self._work(seeds, seconds, seed, write_end)
        os.close(write_end)
        os.set_blocking(self.pipe, False)

    def _work(self, seeds: Seeds, seconds: float, seed: int, write_end: int) -> None:
        try:
            own_threads()
            os.setpgid(0, 0)  # what it forks ends with it
            error = os.open(self.error, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(error, 1)
            os.dup2(error, 2)
            place = seeds.folder / "places" / f"{self.name}-{self.slot}"
            run_inputs(READERS[self.name], seeds, place, seconds, seed, os.fdopen(write_end, "w"), self.shared)
        except BaseException:  # noqa: BLE001 (the campaign itself is wrong: the parent tells)
            os.write(2, traceback.format_exc().encode("utf-8", "replace"))
        finally:
            os._exit(70)

    def rows(self) -> Iterator[dict[str, Any]]:
        """What it told since the last time."""
        with suppress(BlockingIOError):
            while data := os.read(self.pipe, 1 << 20):
                self._buffer += data
        *lines, self._buffer = self._buffer.split(b"\n")
        for row in map(json.loads, lines):
            self.told += row.get("done", 0)
            yield row

    def kill(self) -> None:
        """It and what it forked."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def ended(self) -> int | None:
        """The exit code or minus the signal, once it has ended; kills one whose input takes too long."""
        if not self.overdue and (overdue := self.shared.overdue(self.pid)):
            self.overdue = overdue
            self.kill()
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None

    def close(self) -> None:
        os.close(self.pipe)
        self.shared.close()

    def fault(self, code: int) -> tuple[str, str]:
        """(kind, detail) of its death."""
        tail = self.error.read_bytes()[-2000:].decode("utf-8", "replace") if self.error.exists() else ""
        if self.overdue:
            return self.overdue, tail[-300:]
        if code < 0:
            return signal.Signals(-code).name, tail[-300:]
        last = tail.strip().rpartition("\n")[2]
        return f"the child itself ended with {code}: {last[:120]}", tail


class Campaign:
    """Children of several readers at a time.

    Args:
        goal: stop after so many inputs, if given. end: no child begins after this time (monotonic).
        tell: called every few seconds.
    """

    def __init__(
        self,
        seeds: Seeds,
        tallies: dict[str, Tally],
        keep: Path | None,
        goal: int | None,
        end: float,
        tell: Callable[[], Any],
    ) -> None:
        self.seeds, self.tallies, self.keep, self.goal, self.end = seeds, tallies, keep, goal, end
        self._tell, self._told = tell, time.monotonic()
        self._children: list[Child] = []
        self._again: list[tuple[str, float]] = []  # time that was left to children that died

    def run(self, turns: Iterator[tuple[str, float]], jobs: int, seed: int) -> None:
        """Take turns of (reader, seconds) in `jobs` children until there is none, or the goal or the end is reached."""
        seed_of = itertools.count(seed * 1_000_000)
        try:
            while True:
                free = set(range(jobs)) - {child.slot for child in self._children}
                for slot in sorted(free):
                    left = self.end - time.monotonic()
                    turn = None
                    if left > 0 and not self._is_reached():
                        turn = self._again.pop(0) if self._again else next(turns, None)
                    if turn is not None:
                        seconds = min(turn[1], left)
                        self._children.append(Child(turn[0], self.seeds, slot, seconds, next(seed_of)))
                if not self._children or time.monotonic() > self.end + _GRACE_SECONDS:
                    return
                self._wait()
                if time.monotonic() > self._told + _TOLD_SECONDS:
                    self._tell()
                    self._told = time.monotonic()
        finally:
            for child in self._children:
                child.kill()

    def _is_reached(self) -> bool:
        running = sum(child.shared.done - child.told for child in self._children)
        return self.goal is not None and running + sum(tally.inputs for tally in self.tallies.values()) >= self.goal

    def _wait(self) -> None:
        with selectors.DefaultSelector() as selector:
            for child in self._children:
                selector.register(child.pipe, selectors.EVENT_READ)
            selector.select(timeout=0.25)
        for child in list(self._children):
            code = child.ended()
            for row in child.rows():
                self._note(child.name, row)
            if code is not None:
                self._finish(child, code)
        if self._is_reached():
            for child in self._children:
                child.shared.stop()

    def _finish(self, child: Child, code: int) -> None:
        self._children.remove(child)
        child.kill()
        tally = self.tallies[child.name]
        spent = time.monotonic() - child.begin
        tally.seconds += spent
        if code != 0:
            left = child.seconds - max(spent, 1.0)  # a reader that cannot even begin is not tried for ever
            if left > 0:
                self._again.append((child.name, left))
        if code not in (0, RESTART):
            name, data = child.shared.input()
            tally.inputs += child.shared.done - child.told + bool(name)
            self._note(child.name, {"fault": child.fault(code), "name": name, "data": data.hex()})
        child.close()

    def _note(self, reader: str, row: dict[str, Any]) -> None:
        if "fault" not in row:
            self.tallies[reader].add(row)
            return
        kind, detail = row["fault"]
        if self.tallies[reader].add_fault(kind, detail) and self.keep is not None and row["name"]:
            digest = hashlib.sha256(kind.encode()).hexdigest()[:10]
            place = self.keep / reader / digest / row["name"]
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(bytes.fromhex(row["data"]))


def missing(name: str) -> str:
    """Why a reader cannot run here; empty where it can."""
    lacking = [package for package in READERS[name].packages if importlib.util.find_spec(package) is None]
    return f"needs {', '.join(lacking)}, not installed here" if lacking else ""


def turns(names: list[str], seconds: float, forever: bool) -> Iterator[tuple[str, float]]:
    """(reader, seconds): each reader's time in pieces, readers in turn; again and again with `forever`.

    Where a number of inputs is the goal, readers of which one costs more get a third of the time.
    """
    while True:
        left = {name: seconds / (3 if forever and READERS[name].cost > 1 else 1) for name in names}
        while left:
            for name in list(left):
                piece = min(_BATCH_SECONDS, left[name])
                yield name, piece
                left[name] -= piece
                if left[name] <= 0:
                    del left[name]
        if not forever:
            return


def prepare(seeds: Seeds, names: list[str], tallies: dict[str, Tally]) -> list[str]:
    """Make the seeds of each reader, in a child, one after another; returns readers whose seeds could be made."""
    ready = []
    for name in names:
        pid = os.fork()
        if pid == 0:
            try:
                own_threads()
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, 1)
                READERS[name](seeds, seeds.folder / "places" / f"{name}-0")
                os._exit(0)
            except BaseException:  # noqa: BLE001 (told as a fault of the campaign)
                os.write(2, traceback.format_exc().encode("utf-8", "replace"))
            finally:
                os._exit(70)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code == 0:
            ready.append(name)
        else:
            tallies[name].add_fault(f"seeds could not be made, exit {code}", "")
    return ready


def warm() -> None:
    """Import, once for all children, what they would import."""
    import torch
    import transformers
    from transformers.models.llama import modeling_llama  # noqa: F401

    import optc.api
    import optc.cli.compile
    import optc.runtime.sessions.load
    import optc.training.loop

    if importlib.util.find_spec("onnxruntime"):
        import onnxruntime  # noqa: F401

        import optc.runtime.sessions.ort  # noqa: F401

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30.0, help="for each reader; with --inputs of each round")
    parser.add_argument("--inputs", type=int, help="rounds over all readers until so many inputs were read")
    parser.add_argument("--minutes", type=float, default=1e6, help="end after so long in any case")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--work", type=Path, required=True, help="folder for seeds, kept between runs")
    parser.add_argument("--readers", default=",".join(READERS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--add", type=Path, help="figures of an earlier campaign, to which these are added")
    parser.add_argument("--keep", type=Path, help="folder for one input of each fault")
    return parser.parse_args()


def main(show: Callable[[str], None] = print) -> int:
    """The command line; 1 where there was a fault, or fewer inputs than asked for."""
    options = _options()
    warnings.simplefilter("ignore")
    work = options.work.resolve()
    os.environ |= {"TMPDIR": str(work / "tmp"), "HF_HUB_OFFLINE": "1"}
    (work / "tmp").mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    warm()
    seeds, names = Seeds(work), options.readers.split(",")
    tallies = {name: Tally(skipped=missing(name)) for name in names}
    if options.add:
        for name, row in json.loads(options.add.read_text())["readers"].items():
            tallies.setdefault(name, Tally()).add_figures(row)
    ready = prepare(seeds, [name for name in names if not tallies[name].skipped], tallies)

    def tell() -> dict[str, Any]:
        found = {**figures(tallies), "jobs": options.jobs, "wall_s": round(time.monotonic() - begin, 1)}
        if options.json:
            write_whole(options.json, json.dumps(found, indent=1) + "\n")
        return found

    campaign = Campaign(seeds, tallies, options.keep, options.inputs, begin + 60 * options.minutes, tell)
    campaign.run(turns(ready, options.seconds, options.inputs is not None), options.jobs, options.seed)
    found = tell()
    for name, tally in tallies.items():
        _show(name, tally, show)
    show(f"{found['inputs']} inputs, {found['fault_kinds']} kinds of faults, {found['wall_s']:.0f} s")
    return 1 if found["fault_kinds"] or found["inputs"] < (options.inputs or 0) else 0


def _show(name: str, tally: Tally, show: Callable[[str], None]) -> None:
    if tally.skipped and not tally.inputs:
        show(f"{name}: skipped, {tally.skipped}")
        return
    refused = dict(Counter(tally.refused).most_common())
    show(f"{name}: {tally.inputs} inputs, {tally.read} read, refused {refused}, slowest {tally.slowest:.1f} s")
    for fault in sorted(tally.faults.values(), key=lambda row: -row.count):
        show(f"    {fault.count} {fault.kind} | {' '.join(fault.detail.split())[:300]}")


__all__ = ["READERS", "Reader", "outcome", "warm"]

if __name__ == "__main__":
    sys.exit(main())
