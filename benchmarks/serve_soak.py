"""Minutes of mixed traffic on a server, and whether the memory of its processes grows.

    python benchmarks/serve_soak.py out/fiction-paged --minutes 10
    python benchmarks/serve_soak.py out/fiction-paged --minutes 10 --clients 6 --pause 2 --kv-blocks 256    # beside other work

Clients stream, ask for whole answers, leave in the middle, and send what must be refused. The resident memory of each
process is read every few seconds; its growth is the slope of a line through the second half, in MB per hour, and what it
grew by in that half. What an engine takes once is no growth: blocks of its KV pool when they are first used, and room for
the largest step so far. So long prompts come first, 48 at once, more than run together; and the size of the pool stands
beside what it grew by. A small pool (--kv-blocks) has used all its blocks then. At the end nothing may be left in the
engine, and the server must drain with exit code 0.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from common import record

from optc.compiler.artifact.folder import read_manifest
from optc.runtime.sessions.paged import block_bytes, default_blocks
from optc.runtime.sessions.session import default_threads

_EVERY = 5.0  # seconds between two readings
_SHOWN = 12  # readings between two that are kept
_CROWD = 48
_HEAD = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
_TEXT = (Path(__file__).resolve().parent.parent / "examples" / "book.txt").read_text(encoding="utf-8")


async def ask(port: int, body: bytes, leave_after: int | None) -> int:
    """Send a request; its status, 0 where this client left or was cut off."""
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"{_HEAD}connection: close\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body)
        status, pieces = 0, 0
        while piece := await reader.read(1 << 16):
            status = status or int(piece.split()[1])
            pieces += 1
            if leave_after is not None and pieces >= leave_after:
                status = 0
                break
        writer.close()
    except (OSError, asyncio.IncompleteReadError):
        return 0
    return status


def request(draw: random.Random) -> tuple[bytes, int | None]:
    """A body, and after how many pieces its client leaves."""
    kind = draw.random()
    if kind < 0.05:
        return draw.choice((b"{", b'{"prompt": 5}', b'{"prompt": "' + b"a" * 9_000_000 + b'"}', b'{"x": 1}')), None
    start = draw.randrange(len(_TEXT) - 3000)
    body: dict[str, Any] = {
        "prompt": _TEXT[start : start + draw.choice((40, 200, 1000))],
        "max_tokens": draw.choice((8, 32, 96)),
        "temperature": draw.choice((0, 1)),
        "n": draw.choice((1, 1, 1, 3)),
        "stream": draw.random() < 0.7,
    }
    if draw.random() < 0.3:
        body |= {"stop": ["\n", ". "], "logprobs": 2}
    return json.dumps(body).encode(), draw.choice((None, None, None, 1, 4))


async def traffic(port: int, seconds: float, clients: int, pause: float) -> dict[int, int]:
    """Statuses of all requests, counted; `pause` is the mean of the seconds that a client waits before each."""
    end, seen = time.monotonic() + seconds, dict[int, int]()

    async def client(number: int) -> None:
        draw = random.Random(number)
        while time.monotonic() < end:
            if pause:
                await asyncio.sleep(draw.expovariate(1 / pause))
            status = await ask(port, *request(draw))
            seen[status] = seen.get(status, 0) + 1

    await asyncio.gather(*(client(number) for number in range(clients)))
    return seen


async def crowd(port: int) -> None:
    """Long prompts, all at once: the largest steps that there are."""
    bodies = [{"prompt": _TEXT[100 * row : 100 * row + 1000], "max_tokens": 48, "logprobs": 2} for row in range(_CROWD)]
    await asyncio.gather(*(ask(port, json.dumps(body).encode(), None) for body in bodies))


def memory_of(process: psutil.Process) -> dict[str, float]:
    """MB that are resident, and those of them that are no pages of files, as weights are."""
    info = process.memory_info()
    return {"rss_mb": info.rss / 1e6, "own_mb": (info.rss - info.shared) / 1e6}


async def watched(server: psutil.Process, port: int, args: argparse.Namespace) -> dict[str, Any]:
    """The traffic, and the memory of all processes meanwhile."""
    processes = {"supervisor": server}
    for child in server.children():
        kind = "engine" if any("engine_process" in word for word in child.cmdline()) else f"worker {len(processes)}"
        processes[kind] = child
    new = memory_of(processes["engine"])
    await crowd(port)
    readings: list[tuple[float, dict[str, dict[str, float]]]] = []
    running = asyncio.create_task(traffic(port, args.minutes * 60, args.clients, args.pause))
    begin, worked = time.monotonic(), processor_seconds(processes)
    while not running.done():
        readings.append((time.monotonic() - begin, {name: memory_of(item) for name, item in processes.items()}))
        await asyncio.wait([running], timeout=_EVERY)
    worked = processor_seconds(processes) - worked
    half = readings[len(readings) // 2 :]
    times = np.array([at for at, _ in half])
    memory = {}
    for name in processes:
        values = np.array([row[name]["rss_mb"] for _, row in half])
        slope = np.polyfit(times, values, 1)[0] * 3600 if len(half) > 2 else float("nan")
        memory[name] = {
            "start_mb": readings[0][1][name]["rss_mb"],
            "half_mb": float(values[0]),
            "end_mb": float(values[-1]),
            "mb_per_hour": float(slope),
        }
    course = [{"s": round(at), **row["engine"]} for at, row in (*readings[:-1:_SHOWN], readings[-1])]
    return {
        "statuses": dict(sorted(running.result().items())),
        "processor_s": worked,
        "memory": memory,
        "engine_when_new": new,
        "engine_by_time": course,
        "readings": len(readings),
    }


def processor_seconds(processes: dict[str, psutil.Process]) -> float:
    """Of all of them, since they began."""
    return sum(sum(item.cpu_times()[:2]) for item in processes.values())


async def left(port: int) -> dict[str, float]:
    """What the engine still holds, once it has had a moment."""
    await asyncio.sleep(3)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /metrics HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
    text = (await reader.read()).decode()
    writer.close()
    names = ("optc_requests_running", "optc_requests_waiting", "optc_kv_blocks_used", "optc_engine_starts_total")
    found = {name: re.search(rf"^{name} (\S+)$", text, re.MULTILINE) for name in names}
    return {name: float(match[1]) for name, match in found.items() if match is not None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--pause", type=float, default=0.0, help="mean seconds that a client waits before a request")
    parser.add_argument("--kv-blocks", type=int, default=None, help="of the pool; default: that of optc serve")
    parser.add_argument("--threads", type=int, default=default_threads())
    args = parser.parse_args()
    contract = read_manifest(Path(args.artifact)).contract
    blocks = args.kv_blocks or default_blocks(contract)
    command = [sys.executable, "-m", "optc", "serve", args.artifact, "--port", "0", "--json", "--workers", "2"]
    command += ["--kv-blocks", str(blocks)]
    process = subprocess.Popen([*command, "--threads", str(args.threads)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    port = int(json.loads(process.stdout.readline())["url"].rpartition(":")[2])
    try:
        result = asyncio.run(watched(psutil.Process(process.pid), port, args))
        result["left"] = asyncio.run(left(port))
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
    settings = {"minutes": args.minutes, "clients": args.clients, "pause_s": args.pause, "kv_blocks": blocks}
    pool = {"pool_mb": blocks * block_bytes(contract) / 1e6}
    record("serve_soak", {**settings, **pool, "exit_code": code, **result}, args.threads)


if __name__ == "__main__":
    main()
