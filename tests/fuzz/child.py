"""One process of a campaign: inputs of one reader, under a limit of memory and an audit hook.

The hook sees programs started, sockets opened, modules unpickled and files opened for writing outside the reader's
folder. The parent sees in shared memory which input is being read and since when, so that a child may die or hang.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import resource
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from fuzz.memory import LIMIT_BYTES, InputMemory
from fuzz.readers import ForkError, Input, Reader
from fuzz.seeds import Seeds

LIMIT_SECONDS = 10.0
HANG_SECONDS = 120.0
"""An input may cost `LIMIT_SECONDS` of CPU time; one that waits so long, for a lock or a device, hangs. What it waits for
a processor does not count."""
_PREPARING_SECONDS = 300.0
_TELL_SECONDS = 2.0
_EVENTS = {"pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect"}
_LEAVES = (KeyboardInterrupt, GeneratorExit)
_BEGAN, _CPU, _DONE, _STOP, _SIZE, _EVENT_SIZE = range(6)  # words of the head
_HEAD_BYTES, _EVENT, _INPUT = 48, 512, 4 << 20


class Shared:
    """What a child, its forks and the campaign see of each other: when the input began that is being read and the CPU
    time used until then, how many were done, whether to stop, the last input, and the first event of the audit hook.

    The numbers are whole aligned words, each written at once: the campaign reads while the child writes.
    """

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _HEAD_BYTES + _EVENT + _INPUT)
        self._words = memoryview(self._memory)[:_HEAD_BYTES].cast("Q")
        self.prepare()

    def prepare(self) -> None:
        """No input is being read: the next one is made, which is no cost of one."""
        self._words[_CPU] = cpu_ns() + int(_PREPARING_SECONDS * 1e9)
        self._words[_BEGAN] = time.monotonic_ns() + int((_PREPARING_SECONDS - HANG_SECONDS) * 1e9)

    def begin(self, done: int, made: Input) -> None:
        """An input is about to be read, after `done` others."""
        data = made[0].encode() + b"\0" + made[1]
        data = data[:_INPUT]
        self._memory[_HEAD_BYTES + _EVENT : _HEAD_BYTES + _EVENT + len(data)] = data
        self._words[_SIZE] = len(data)
        self._words[_CPU] = cpu_ns()
        self._words[_BEGAN] = time.monotonic_ns()
        self._words[_DONE] = done

    @property
    def done(self) -> int:
        return self._words[_DONE]

    def overdue(self, group: int) -> str:
        """How an input that takes too long does so; empty where none does.

        Args:
            group: the child and its forks. What an input costs is their CPU time: on a busy machine it may wait long.
        """
        waited = (time.monotonic_ns() - self._words[_BEGAN]) / 1e9
        if waited > HANG_SECONDS and waited - group_seconds_in_queue(group) > HANG_SECONDS:
            return f"did not end in {HANG_SECONDS:g} s"
        if waited > LIMIT_SECONDS and group_cpu_seconds(group) - self._words[_CPU] / 1e9 > LIMIT_SECONDS:
            return f"took more than {LIMIT_SECONDS:g} s of CPU time"
        return ""

    @property
    def stopping(self) -> bool:
        return bool(self._words[_STOP])

    def stop(self) -> None:
        """Let the child end after its input."""
        self._words[_STOP] = 1

    def input(self) -> Input:
        """The last that was begun; ("", b"") before the first."""
        data = self._memory[_HEAD_BYTES + _EVENT : _HEAD_BYTES + _EVENT + self._words[_SIZE]]
        name, _, content = data.partition(b"\0")
        return name.decode(), content

    def note_event(self, name: str, detail: str) -> None:
        """Keep the first that was seen."""
        if not self._words[_EVENT_SIZE]:
            data = f"{name}\0{detail}".encode("utf-8", "replace")[:_EVENT]
            self._memory[_HEAD_BYTES : _HEAD_BYTES + len(data)] = data
            self._words[_EVENT_SIZE] = len(data)

    def take_event(self) -> tuple[str, str] | None:
        """(name, detail) of what the hook saw since the last time."""
        size = self._words[_EVENT_SIZE]
        if not size:
            return None
        self._words[_EVENT_SIZE] = 0
        name, _, detail = self._memory[_HEAD_BYTES : _HEAD_BYTES + size].decode("utf-8", "replace").partition("\0")
        return name, detail

    def close(self) -> None:
        self._words.release()
        self._memory.close()


def own_threads() -> None:
    """Let torch make its pool of threads anew, first thing in a fork: it does so by itself when the pool is asked for,
    and two threads that ask at once, as where transformers loads weights, find none."""
    import torch

    torch.set_num_threads(torch.get_num_threads())


def cpu_ns() -> int:
    """CPU time of this process and of its forks that have ended."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time_ns() + int((ended.ru_utime + ended.ru_stime) * 1e9)


def group_cpu_seconds(group: int) -> float:
    """CPU time of a process group's members, and of children that they have waited for."""
    ticks = sum(sum(map(int, fields[11:15])) for _, fields in _members(group))  # user, system, the same of children
    return ticks / os.sysconf("SC_CLK_TCK")


def group_seconds_in_queue(group: int) -> float:
    """Time that the threads of a process group's members were ready to run and had no processor; 0 where the kernel does
    not say."""
    waited = 0
    for folder, _ in _members(group):
        for path in folder.glob("task/*/schedstat"):
            with suppress(OSError):  # it has ended
                waited += int(path.read_text().split()[1])
    return waited / 1e9


def _members(group: int) -> Iterator[tuple[Path, list[str]]]:
    """Folder in /proc, and the fields of `stat` behind the name (state, parent, group, ...), of each process."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text(errors="replace").rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        if int(fields[2]) == group:
            yield path.parent, fields


RESTART = 75
"""The exit code of a child that holds much memory: another one goes on with its time."""


def outcome(reader: Reader, made: Input) -> tuple[str, Any]:
    """("read", None), ("refused", exit code) or ("fault", (kind, detail)) of one input."""
    from optc.compiler.diagnostics import OptcError

    try:
        reader.read(*made)
    except OptcError as error:
        if type(error).__name__ == "BugError":
            return "fault", (f"BugError at {error.where}", str(error))
        return "refused", error.exit_code
    except reader.refusals as error:
        code = getattr(error, "exit_code", getattr(error, "code", 2))
        if code == 0:
            return "read", None
        if code == 1:  # of a command in a process of its own
            return "fault", ("exit 1", str(made[1][:80]))
        return "refused", code if isinstance(code, int) else 2
    except _LEAVES:
        raise
    except BaseException as error:  # noqa: BLE001 (that is what is looked for)
        return "fault", (kind_of(error), str(error)[:200])
    return "read", None


def kind_of(error: BaseException) -> str:
    """An exception and where it arose: in optc's code, and at all."""
    if isinstance(error, ForkError):
        return error.kind
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/optc/" in frame.filename] or frames
    place = f"{own[-1].filename.rpartition('/optc/')[2]} {own[-1].name}"
    inner = f"{frames[-1].filename.rpartition('/')[2]} {frames[-1].name}"
    return f"{type(error).__name__} at {place} ({inner})"


class _Telling:
    """Sums for the parent, told now and then, so that little is lost with a child that dies."""

    def __init__(self, out: IO[str]) -> None:
        self._out = out
        self._clear()

    def _clear(self) -> None:
        self._told = time.monotonic()
        self._row: dict[str, Any] = {"done": 0, "read": 0, "slowest": 0.0, "largest": 0}
        self._refused = Counter[int]()

    def count(self, kind: str, more: Any, seconds: float, taken: int) -> None:
        self._row["done"] += 1
        self._row["slowest"] = max(self._row["slowest"], seconds)
        self._row["largest"] = max(self._row["largest"], taken)
        if kind == "read":
            self._row["read"] += 1
        elif kind == "refused":
            self._refused[more] += 1
        if time.monotonic() - self._told > _TELL_SECONDS:
            self.tell()

    def tell(self) -> None:
        self._say({**self._row, "refused": self._refused})
        self._clear()

    def tell_fault(self, fault: tuple[str, str], made: Input) -> None:
        self._say({"fault": fault, "name": made[0], "data": made[1].hex()})

    def _say(self, row: dict[str, Any]) -> None:
        self._out.write(json.dumps(row) + "\n")
        self._out.flush()


def run_inputs(
    make_reader: Any, seeds: Seeds, place: Path, seconds: float, seed: int, out: IO[str], shared: Shared
) -> None:
    """Inputs of one reader until the time is over or the campaign says stop, or much memory is held; does not return."""
    rng, reader = random.Random(seed), make_reader(seeds, place)
    memory = InputMemory()
    _limit_memory()
    _audit(shared, (str(seeds.folder), "/dev/", "/tmp/torchinductor", "/proc/self", os.environ["TMPDIR"]))
    end, done, telling, code = time.monotonic() + seconds, 0, _Telling(out), 0
    while (not done or time.monotonic() < end) and not shared.stopping:  # a machine that is busy reads one at least
        try:
            made = reader.make(rng)
        except (RecursionError, UnicodeError):
            continue  # nested or strange beyond what Python writes
        if memory.is_full():
            code = RESTART
            break
        memory.begin()
        shared.begin(done, made)
        first = cpu_ns()
        kind, more = outcome(reader, made)
        shared.prepare()
        if event := shared.take_event():
            kind, more = "fault", (f"event {event[0]}", event[1])
        done += 1
        taken = memory.taken()
        if taken > LIMIT_BYTES and kind != "fault":
            kind, more = "fault", ("took more than 2 GiB", f"{taken} bytes")
        telling.count(kind, more, (cpu_ns() - first) / 1e9, taken)
        if kind == "fault":
            telling.tell_fault(more, made)
    shared.begin(done, ("", b""))
    telling.tell()
    os._exit(code)


def _limit_memory() -> None:
    """What is written counts, not what threads of engines reserve: dozens of them take gigabytes of addresses."""
    status = Path("/proc/self/status").read_text()
    held = int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmData:"))) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (held + 2 * LIMIT_BYTES, held + 2 * LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))


def _audit(shared: Shared, allowed: tuple[str, ...]) -> None:
    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        if name in _EVENTS:
            shared.note_event(name, str(arguments)[:160])
        elif name == "open" and _is_writing(arguments):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if not path.startswith(allowed):
                shared.note_event("write", path)

    sys.addaudithook(hook)


def _is_writing(arguments: tuple[Any, ...]) -> bool:
    path, _, flags = arguments
    named = isinstance(path, str | bytes) and isinstance(flags, int)
    return named and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
