"""What HTTP costs: the same requests to an engine in process, and to it behind `optc serve`.

    python benchmarks/serve_http.py out/fiction-paged                       # an artifact that generates
    python benchmarks/serve_http.py out/fiction-paged --workers 1 2 4 --concurrency 64 --requests 512

`alone`: the engine in this process, as many requests open. `http`: the whole server, asked by the client of `optc bench
--serve`. `instant`: the same server before an engine that computes nothing: what HTTP itself can do. With each go the
processor seconds of every process, and microseconds per token of each: what is nearest to one second per second limits.
On few cores the client takes its share too.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import psutil
from common import ROOT, record

from optc.compiler.artifact.folder import read_manifest
from optc.runtime.measuring.load.run import Slo, closed_loop, figures
from optc.runtime.measuring.load.workload import Workload
from optc.runtime.serving.answers import Answers
from optc.runtime.serving.engine_process import open_artifact
from optc.runtime.serving.interface import Engine
from optc.runtime.serving.request import Answer, EngineInfo, EngineMetrics, Generate
from optc.runtime.serving.settings import ServeOptions
from optc.runtime.sessions.session import default_threads

LONGEST = 1024
"""Tokens of a prompt with its answer."""


class Instant:
    """An engine that gives every running request the same token in each step."""

    def __init__(self, vocab_size: int) -> None:
        self.info = EngineInfo(
            vocab_size=vocab_size, context_length=4096, serves="continuous", max_running=1 << 16, max_waiting=1 << 16
        )
        self._left: dict[str, int] = {}

    def submit(self, request: Generate) -> None:
        self._left[request.id] = request.max_new_tokens

    def cancel(self, identity: str) -> None:
        self._left.pop(identity, None)

    def step(self) -> Answers:
        ended = [Answer(id=name, tokens=[300], finish="length") for name, left in self._left.items() if left == 1]
        self._left = {name: left - 1 for name, left in self._left.items() if left > 1}
        time.sleep(0.002)  # a step of a fast engine: without it, tokens come in heaps that are one event
        count = len(self._left)
        return Answers(list(self._left), np.full(count, 300, np.int32), np.ones(count, np.int64), ended)

    @property
    def idle(self) -> bool:
        return not self._left

    def metrics(self) -> EngineMetrics:
        return EngineMetrics(running=len(self._left), waiting=0)

    def close(self) -> None:
        return


def open_instant(folder: Path, options: ServeOptions) -> Instant:
    """The opener of the server's engine process."""
    return Instant(read_manifest(folder).contract.model.vocab_size)


def alone(engine: Engine, load: Workload, count: int, concurrency: int) -> dict[str, Any]:
    """The engine in this process."""
    bodies = deque(msgspec.json.decode(body) for body in load.bodies(count))
    number, tokens, running = 0, 0, 0
    begin, used = time.perf_counter(), time.process_time()
    while bodies or running:
        while bodies and running < concurrency:
            body = bodies.popleft()
            engine.submit(Generate(id=str(number), prompt=body["prompt"], max_new_tokens=body["max_tokens"]))
            number, running = number + 1, running + 1
        for answer in engine.step():
            tokens += len(answer.tokens)
            running -= answer.finish is not None
    seconds = time.perf_counter() - begin
    return {
        "seconds": seconds,
        "requests_per_s": count / seconds,
        "output_tokens_per_s": tokens / seconds,
        "cpu_s": {"engine": time.process_time() - used},
    }


def served(args: argparse.Namespace, opener: str, workers: int, seed: int) -> dict[str, Any]:
    """The whole server, and the client in this process."""
    options = {
        "port": 0,
        "workers": workers,
        "threads": args.threads,
        "max_running": args.max_running,
        "max_waiting": 1 << 16,
    }
    config = {"folder": args.artifact, "name": "model", "opener": opener, "options": options}
    path = os.pathsep.join([str(ROOT / "benchmarks"), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    server = subprocess.Popen(
        [sys.executable, "-c", _SERVER, msgspec.json.encode(config)],
        env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert server.stdout is not None
    url = msgspec.json.decode(server.stdout.readline())["url"]
    processes = {_kind(child): child for child in psutil.Process(server.pid).children()}
    load = workload(args, seed)
    common = {"concurrency": args.concurrency, "on_request": lambda done, total: None}
    asyncio.run(closed_loop(url, "", workload(args, seed + 1000), count=2 * args.concurrency, **common))  # compiles
    before = {name: _cpu(process) for name, process in processes.items()}
    own = time.process_time()
    timings = asyncio.run(closed_loop(url, "", load, count=args.requests, **common))
    used = {name: _cpu(process) - before[name] for name, process in processes.items()}
    used["client"] = time.process_time() - own
    server.terminate()
    server.wait()
    found = figures(timings, Slo())
    return {
        **found,
        "cpu_s": used,
        "cpu_us_per_token": {name: seconds / found["output_tokens"] * 1e6 for name, seconds in used.items()},
    }


_SERVER = """
import asyncio, json, sys, msgspec
from pathlib import Path
from optc.runtime.serving.settings import ServerConfig
from optc.runtime.serving.supervisor import Supervisor
config = msgspec.json.decode(sys.argv[1], type=ServerConfig, dec_hook=lambda kind, value: Path(value))
async def run():
    await Supervisor(config, lambda event, more: event == "ready" and print(json.dumps(more), flush=True)).run()
asyncio.run(run())
"""


def _kind(process: psutil.Process) -> str:
    return "engine" if any("engine_process" in word for word in process.cmdline()) else f"worker {process.pid}"


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def workload(args: argparse.Namespace, seed: int) -> Workload:
    """Requests of random tokens."""
    vocabulary = read_manifest(Path(args.artifact)).contract.model.vocab_size
    return Workload(
        prompt_tokens=args.prompt_length,
        new_tokens=args.new_tokens,
        longest=LONGEST,
        vocab_size=vocabulary,
        sigma=args.sigma,
        seed=seed,
        body={"temperature": 0},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--prompt-length", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--sigma", type=float, default=0.0)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--max-running", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--name", default="serve_http")
    args = parser.parse_args()
    rounds: list[dict[str, Any]] = []
    engine = open_artifact(
        Path(args.artifact), ServeOptions(threads=args.threads, max_running=args.max_running, max_waiting=1 << 16)
    )
    alone(engine, workload(args, 999), 2 * args.concurrency, args.concurrency)
    for turn in range(args.rounds):
        found: dict[str, Any] = {"alone": alone(engine, workload(args, turn), args.requests, args.concurrency)}
        for workers in args.workers:
            found[f"http, {workers} worker(s)"] = served(
                args, "optc.runtime.serving.engine_process:open_artifact", workers, 100 + turn
            )
            found[f"instant, {workers} worker(s)"] = served(args, "serve_http:open_instant", workers, 200 + turn)
        rounds.append(found)
        for name, row in found.items():
            print(
                turn,
                name,
                round(row["output_tokens_per_s"]),
                "tokens/s",
                row.get("cpu_us_per_token", row["cpu_s"]),
                flush=True,
            )
    engine.close()
    settings = {name: value for name, value in vars(args).items() if name != "artifact"}
    record(args.name, {"settings": settings, "rounds": rounds}, args.threads or default_threads())


if __name__ == "__main__":
    main()
