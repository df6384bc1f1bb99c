"""What the host does for a step of an engine whose model is a stub: planning, collecting, telling, and messages to clients.

    python benchmarks/serve_host.py                 # 256 rows, a minute
    python benchmarks/serve_host.py --rows 32 --ahead 0

All rows decode: every request has the same prompt length and as many tokens to give as are measured, so steps begin, end
and grow nothing but blocks, one in 16 rows a step. The stub gives made-up tokens as arrays, as a runner does. `engine` is
`PagedEngine.step`; `server` is what `EngineServer` does with what it gave: each client's share as one message, encoded;
`client` is what the API processes do with those messages, one by one, up to the tokens of each request. Microseconds of
processor time, medians of the rounds; a collector's pass is not among them.
"""

from __future__ import annotations

import argparse
import gc
import socket
import statistics
import time
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from optc.runtime.serving.client import Channel, EngineClient
from optc.runtime.serving.engine_options import EngineOptions
from optc.runtime.serving.engine_process import Client, EngineServer
from optc.runtime.serving.model_runner import ModelRunner
from optc.runtime.serving.paged_engine import PagedEngine
from optc.runtime.serving.plan import Chosen, Plan
from optc.runtime.serving.request import Generate
from optc.runtime.serving.wire import Frames, FromEngine, decode_from_engine, frame

PROMPT, VOCABULARY = 128, 32000


class Stub:
    """A runner that computes nothing."""

    most_steps, model_s = 1, 0.0

    def __init__(self, ahead: int) -> None:
        self.ahead = ahead
        self._plans: list[Plan] = []

    def warm_up(self, most_tokens: int) -> None:
        return

    def launch(self, plan: Plan) -> None:
        self._plans.append(plan)

    def collect(self) -> Chosen:
        plan = self._plans.pop(0)
        return Chosen.one_each((plan.rows * 7 + 300) % VOCABULARY)


class Server(EngineServer):
    """One without sockets: messages are encoded and kept."""

    def __init__(self, engine: PagedEngine) -> None:
        self._ends = socket.socketpair()
        super().__init__(engine, self._ends[0])
        self.sent: list[tuple[Client, bytes]] = []

    def _send(self, client: Client, message: FromEngine) -> None:
        self.sent.append((client, frame(message)))

    def add(self, client: Client, request: Generate) -> None:
        """A request of a client."""
        self._submit(client, request)


def open_stub(rows: int, ahead: int, steps: int) -> PagedEngine:
    """An engine with room for so many rows and steps."""
    blocks = rows * (-(-(PROMPT + steps + 32) // 16))
    model = SimpleNamespace(
        num_blocks=blocks + 64,
        block_size=16,
        context_length=1 << 16,
        vocab_size=VOCABULARY,
        on_device=ahead > 0,
        chunk=1 << 16,
    )
    options = EngineOptions(max_running=rows, max_waiting=rows, max_context=PROMPT + steps + 16, token_budget=8 * rows)
    return PagedEngine(cast(Any, model), options, lambda *_: cast(ModelRunner, Stub(ahead)))


def measure(rows: int, workers: int, ahead: int, steps: int) -> dict[str, float]:
    """Microseconds of a step's parts."""
    engine = open_stub(rows, ahead, steps)
    server, rng = Server(engine), np.random.default_rng(0)
    clients = [Client(socket.socketpair()[0]) for _ in range(workers)]
    readers = [(EngineClient("", lambda info: None), Frames()) for _ in range(workers)]
    channels: list[Channel] = []
    for index in range(rows):
        worker = index % workers
        prompt = rng.integers(0, VOCABULARY, PROMPT).tolist()
        request = Generate(id=f"{4000 + worker}-{index}", prompt=prompt, max_new_tokens=steps)
        server.add(clients[worker], request)
        channels.append(Channel(readers[worker][0], [request]))
        readers[worker][0]._channels[request.id] = channels[-1]
    while engine.scheduler.waiting or not engine.scheduler.rows.decoding[:rows].all():
        server._give(engine.step())
    took: dict[str, list[float]] = {"engine": [], "server": [], "client": []}
    for _ in range(steps - 80):
        server.sent.clear()
        at = [time.process_time()]
        answers = engine.step()
        at.append(time.process_time())
        server._give(answers)
        at.append(time.process_time())
        for worker, data in ((clients.index(client), data) for client, data in server.sent):
            client, frames = readers[worker]
            for item in frames.feed(data):
                client._receive(decode_from_engine(item))
        at.append(time.process_time())
        for name, seconds in zip(took, np.diff(at).tolist(), strict=True):
            took[name].append(seconds * 1e6)
        for channel in channels:
            channel._pending = {}
    size = sum(len(data) for _, data in server.sent)
    return {name: statistics.mean(values) for name, values in took.items()} | {"message_bytes": size}


def main() -> None:
    """Measure, print and record."""
    from common import record

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4], help="API processes")
    parser.add_argument("--ahead", type=int, default=1, help="1: tokens are read one step late, as on a GPU")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    gc.collect()
    gc.freeze()
    gc.disable()
    result: dict[str, Any] = {}
    for workers in given.workers:
        runs = [measure(given.rows, workers, given.ahead, given.steps) for _ in range(given.rounds)]
        row = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        result[f"{workers} workers"] = row
        print(workers, {name: round(value, 1) for name, value in row.items()})
    record("serve_host", {"settings": vars(given), "us_per_step": result}, 1)


if __name__ == "__main__":
    main()
