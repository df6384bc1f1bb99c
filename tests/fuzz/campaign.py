"""A fuzzing campaign over all readers, in children that may die: `make fuzz`, or

    python -m fuzz.campaign --seconds 60 --work /tmp/fuzz [--readers Header,Onnx] [--json FILE] [--keep CORPUS]

Each child runs inputs of one reader under a limit of memory, with an audit hook that sees programs started, sockets
opened, modules unpickled and files opened for writing outside the reader's folder. The parent watches the clock.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import mmap
import os
import random
import resource
import signal
import struct
import sys
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzz.readers import CHEAP, Input, Reader, by_name
from fuzz.seeds import Seeds
from fuzz.whole import WHOLE

READERS = by_name((*CHEAP, *WHOLE))
LIMIT_SECONDS, LIMIT_BYTES = 10.0, 2 << 30
_BATCH_SECONDS = 20.0  # of one child
_EVENTS = {"pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect"}
_LEAVES = (KeyboardInterrupt, GeneratorExit)


@dataclass
class Fault:
    """An outcome that is neither success nor a documented error.

    Attributes:
        kind: the exception or signal and where it arose; equal kinds count as one.
    """

    kind: str
    detail: str
    count: int = 0


@dataclass
class Tally:
    """What a reader made of its inputs."""

    inputs: int = 0
    read: int = 0
    refused: Counter[int] = field(default_factory=Counter)
    faults: dict[str, Fault] = field(default_factory=dict)
    slowest: float = 0.0
    seconds: float = 0.0
    peak_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """As the results have it."""
        return {
            "inputs": self.inputs,
            "read": self.read,
            "refused_by_exit_code": dict(sorted(self.refused.items())),
            "faults": [{"kind": row.kind, "count": row.count, "detail": row.detail} for row in self.faults.values()],
            "slowest_s": round(self.slowest, 2),
            "seconds": round(self.seconds, 1),
            "peak_bytes_above_start": self.peak_bytes,
        }


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
        return "refused", code if isinstance(code, int) else 2
    except _LEAVES:
        raise
    except BaseException as error:  # noqa: BLE001 (that is what is looked for)
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if "/optc/" in frame.filename] or frames
        place = f"{own[-1].filename.rpartition('/optc/')[2]} {own[-1].name}"
        inner = f"{frames[-1].filename.rpartition('/')[2]} {frames[-1].name}"
        return "fault", (f"{type(error).__name__} at {place} ({inner})", str(error)[:200])
    return "read", None


def campaign(name: str, seeds: Seeds, seconds: float, seed: int, keep: Path | None) -> Tally:
    """Run one reader for some seconds."""
    tally, end, number = Tally(), time.monotonic() + seconds, seed
    begin = time.monotonic()
    while time.monotonic() < end:
        number += 1
        _run_child(name, seeds, min(_BATCH_SECONDS, end - time.monotonic()), number, tally, keep)
    tally.seconds = time.monotonic() - begin
    return tally


def _run_child(name: str, seeds: Seeds, seconds: float, seed: int, tally: Tally, keep: Path | None) -> None:
    clock = mmap.mmap(-1, 64)  # when the input began, how many were done
    current = seeds.folder / f"current-{name}"
    clock[:16] = struct.pack("<dQ", time.monotonic() + 120, 0)
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read_end)
        try:
            _child(name, seeds, seconds, seed, os.fdopen(write_end, "w"), clock, current)
        except BaseException:  # noqa: BLE001 (the campaign itself is wrong: the parent tells)
            traceback.print_exc()
        finally:
            os._exit(70)
    os.close(write_end)
    stop, hung = threading.Event(), []

    def watch() -> None:
        while not stop.wait(0.5):
            if time.monotonic() - struct.unpack("<d", clock[:8])[0] > LIMIT_SECONDS:
                hung.append(True)
                os.kill(pid, signal.SIGKILL)
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    with os.fdopen(read_end) as lines:
        for line in lines:
            _note(tally, name, json.loads(line), keep)
    stop.set()
    watcher.join()
    _, status = os.waitpid(pid, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) != 0:
        raise RuntimeError((seeds.folder / f"error-{name}").read_text()[-2000:])
    if os.WIFSIGNALED(status):
        done = struct.unpack("<Q", clock[8:16])[0]
        kind = "took more than 10 s" if hung else signal.Signals(os.WTERMSIG(status)).name
        error = seeds.folder / f"error-{name}"
        tail = error.read_bytes()[-300:].decode("utf-8", "replace") if error.exists() else ""
        made = current.read_bytes() if current.exists() else b""
        file, _, data = made.partition(b"\0")
        _note(tally, name, {"done": done + 1, "fault": [kind, tail], "name": file.decode(), "data": data.hex()}, keep)


def _note(tally: Tally, name: str, row: dict[str, Any], keep: Path | None) -> None:
    tally.inputs += row.get("done", 0)
    tally.read += row.get("read", 0)
    tally.refused.update({int(code): count for code, count in row.get("refused", {}).items()})
    tally.slowest = max(tally.slowest, row.get("slowest", 0.0))
    tally.peak_bytes = max(tally.peak_bytes, row.get("grown", 0))
    if "fault" in row:
        kind, detail = row["fault"]
        fault = tally.faults.setdefault(kind, Fault(kind, detail))
        fault.count += 1
        if keep is not None and fault.count == 1 and row.get("name"):
            digest = hashlib.sha256(kind.encode()).hexdigest()[:10]
            place = keep / name / digest / row["name"]
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(bytes.fromhex(row["data"]))


def _child(name: str, seeds: Seeds, seconds: float, seed: int, out: Any, clock: mmap.mmap, current: Path) -> None:
    """Inputs until the time is over; tells of faults as they come, and of the rest at the end."""
    error = os.open(seeds.folder / f"error-{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(error, 1)
    os.dup2(error, 2)
    place = seeds.folder / "places" / name
    rng, events = random.Random(seed), []
    reader = READERS[name](seeds, place)
    _limit_memory()
    _audit(
        events, (str(seeds.folder), "/dev/", "/tmp/torchinductor", "/proc/self", os.environ.get("TMPDIR", "/tmp/optc"))
    )
    start, begin, row = _resident(), time.monotonic(), _Row()
    expensive = type(reader).cost >= 4
    while time.monotonic() - begin < seconds:
        try:
            made = reader.make(rng)
        except (RecursionError, UnicodeError):
            continue  # nested or strange beyond what Python writes
        clock[:16] = struct.pack("<dQ", time.monotonic(), row.done)
        if expensive or row.done % 64 == 0:
            current.write_bytes(made[0].encode() + b"\0" + made[1])
        first = time.monotonic()
        kind, more = outcome(reader, made)
        row.slowest = max(row.slowest, time.monotonic() - first)
        row.done += 1
        if events:
            kind, more = "fault", (f"event {events[0][0]}", str(events[0][1:]))
            events.clear()
        if kind == "read":
            row.read += 1
        elif kind == "refused":
            row.refused[more] += 1
        else:
            fault = {"fault": more, "name": made[0], "data": made[1].hex()}
            out.write(json.dumps(fault) + "\n")
            out.flush()
        if expensive and _resident() - start > LIMIT_BYTES:
            fault = {"fault": ("took more than 2 GiB", ""), "name": made[0], "data": made[1].hex()}
            out.write(json.dumps(fault) + "\n")
            break
    last = {"done": row.done, "read": row.read, "refused": row.refused, "slowest": row.slowest}
    out.write(json.dumps({**last, "grown": max(0, _resident() - start)}) + "\n")
    out.flush()
    os._exit(0)


@dataclass
class _Row:
    done: int = 0
    read: int = 0
    refused: Counter[int] = field(default_factory=Counter)
    slowest: float = 0.0


def _resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _limit_memory() -> None:
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + 2 * LIMIT_BYTES, held + 2 * LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 30, 1 << 30))


def _audit(events: list[tuple[str, str]], allowed: tuple[str, ...]) -> None:
    def hook(name: str, arguments: tuple[Any, ...]) -> None:
        if name in _EVENTS:
            events.append((name, str(arguments)[:160]))
        elif name == "open" and _is_writing(arguments):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if not path.startswith(allowed):
                events.append(("write", path))

    sys.addaudithook(hook)


def _is_writing(arguments: tuple[Any, ...]) -> bool:
    path, _, flags = arguments
    named = isinstance(path, str | bytes) and isinstance(flags, int)
    return named and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


def warm() -> None:
    """Import, once for all children, what they would import."""
    import onnxruntime  # noqa: F401
    import torch
    import transformers
    from transformers.models.llama import modeling_llama  # noqa: F401

    import optc.api
    import optc.cli.compile
    import optc.runtime.sessions.load
    import optc.runtime.sessions.ort
    import optc.training.loop  # noqa: F401

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()


def main(show: Callable[[str], None] = print) -> int:
    """The command line; 1 where there was a fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=30.0, help="for each reader")
    parser.add_argument("--work", type=Path, required=True, help="folder for seeds, kept between runs")
    parser.add_argument("--readers", default=",".join(READERS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--keep", type=Path, help="folder for one input of each fault")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    os.environ["TMPDIR"] = str(options.work / "tmp")
    (options.work / "tmp").mkdir(parents=True, exist_ok=True)
    os.environ["HF_HUB_OFFLINE"] = "1"
    warm()
    seeds, found = Seeds(options.work.resolve()), {}
    for name in options.readers.split(","):
        tally = campaign(name, seeds, options.seconds, options.seed, options.keep)
        found[name] = tally.to_dict()
        show(f"{name}: {tally.inputs} inputs, {tally.read} read, refused {dict(tally.refused)}, {tally.slowest:.1f} s")
        for fault in sorted(tally.faults.values(), key=lambda row: -row.count):
            show(f"    {fault.count} {fault.kind} | {' '.join(fault.detail.split())[:300]}")
    total, faults = sum(row["inputs"] for row in found.values()), sum(len(row["faults"]) for row in found.values())
    show(f"{total} inputs, {faults} kinds of faults")
    if options.json:
        options.json.write_text(json.dumps({"inputs": total, "fault_kinds": faults, "readers": found}, indent=1) + "\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
