"""SIGKILL of the processes of `optc serve` while requests run: part of `make faults`, or

    python -m fuzz.serve_kills --work /tmp/kills [--servers 20] [--minutes 20] [--json FILE]

Of each server the engine and the worker are killed as often as it starts them again, at random moments of a constant
traffic, and then the supervisor. A request may be refused, cut off, or answered with what it is answered without a
kill; it may not hang or be answered with anything else. The server has to answer again, nothing may outlive the
supervisor, the artifact has to stay whole, and the next server has to remove what is left in the temporary folder.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import signal
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from fuzz.seeds import Seeds

KILLS_OF_EACH = 3  # a process that ends once more is not started again
_PATIENCE = 60.0  # seconds until a request or a server that does not come back is a hang
_CLIENTS = 3


@dataclass
class Found:
    """What a campaign has seen."""

    kills: Counter[str] = field(default_factory=Counter)
    requests: Counter[str] = field(default_factory=Counter)
    back_seconds: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As the results have it."""
        back = sorted(self.back_seconds)
        return {
            "kills": dict(self.kills),
            "killed": self.kills.total(),
            "requests": dict(self.requests),
            "answers_again_after_s": {"median": back[len(back) // 2], "most": back[-1]} if back else {},
            "wrong": self.wrong,
        }


def body(number: int, stream: bool) -> dict[str, Any]:
    """A request of which there are ten."""
    prompt = "The old man looked at the sea, and"[: 5 + 3 * (number % 10)]
    return {"model": "model", "prompt": prompt, "max_tokens": 24, "temperature": 0, "stream": stream}


def ask(port: int, number: int, stream: bool) -> tuple[str, str]:
    """("answered", text), ("refused", status), ("cut", what) or ("hung", what)."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_PATIENCE)
    try:
        connection.request(
            "POST", "/v1/completions", json.dumps(body(number, stream)), {"content-type": "application/json"}
        )
        answer = connection.getresponse()
        text = answer.read().decode()
    except TimeoutError:
        return "hung", f"request {number}, stream {stream}"
    except (OSError, http.client.HTTPException) as error:
        return "cut", type(error).__name__
    finally:
        connection.close()
    if answer.status != 200:
        return "refused", str(answer.status)
    if not stream:
        return "answered", json.loads(text)["choices"][0]["text"]
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    if not events or events[-1] != "[DONE]":
        return "cut", "stream"
    pieces = [json.loads(event) for event in events[:-1]]
    if any("error" in piece for piece in pieces):
        return "refused", "in the stream"
    return "answered", "".join(piece["choices"][0]["text"] for piece in pieces if piece["choices"])


class Traffic:
    """Clients that ask one after another until the end; everything that they see is counted."""

    def __init__(self, port: int, expected: list[str], found: Found) -> None:
        self._port, self._expected, self._found = port, expected, found
        self.ending, self.answered = threading.Event(), 0
        self.clients = [threading.Thread(target=self._run, args=(index,)) for index in range(_CLIENTS)]
        for client in self.clients:
            client.start()

    def _run(self, index: int) -> None:
        number = index
        while not self.ending.is_set():
            number += _CLIENTS
            kind, text = ask(self._port, number, stream=number % 2 == 0)
            if kind == "answered" and text != self._expected[number % 10]:
                kind = "wrong"
            self._found.requests[kind] += 1
            if kind == "answered":
                self.answered += 1
            elif kind in ("wrong", "hung"):
                self._found.wrong.append(f"{kind}: {text!r}")
            else:
                time.sleep(0.2)

    def answers_again(self) -> float | None:
        """Seconds until the next answer; None where none comes."""
        begin, before = time.monotonic(), self.answered
        while time.monotonic() < begin + _PATIENCE:
            if self.answered > before:
                return time.monotonic() - begin
            time.sleep(0.01)
        return None


def kill_one_server(artifact: Path, temporary: Path, expected: list[str], chance: random.Random, found: Found) -> None:
    """Start a server; kill its engine and its worker at random moments, and then itself."""
    from serving_server import running

    from optc.runtime.serving.settings import ServeOptions

    opener = "optc.runtime.serving.engine_process:open_artifact"
    with running(artifact, ServeOptions(), opener=opener, environment={"TMPDIR": str(temporary)}) as server:
        port = server.port
        if not expected:
            expected += [ask(port, number, stream=False)[1] for number in range(10)]
        traffic = Traffic(port, expected, found)
        try:
            kinds = ["engine", "worker"] * KILLS_OF_EACH
            chance.shuffle(kinds)
            for kind in kinds:
                if traffic.answers_again() is None:
                    found.wrong.append(f"no answer before the kill of the {kind}")
                    break
                time.sleep(chance.uniform(0, 0.3))
                os.kill(server.children()[kind], signal.SIGKILL)
                found.kills[kind] += 1
                time.sleep(0.1)  # answers that were on their way
                seconds = traffic.answers_again()
                if seconds is None:
                    found.wrong.append(f"no answer after a kill of the {kind}")
                    break
                found.back_seconds.append(round(seconds, 2))
            time.sleep(chance.uniform(0, 0.3))
            _kill_supervisor(server.process, found)
        finally:
            traffic.ending.set()
            for client in traffic.clients:
                client.join(2 * _PATIENCE)


def _kill_supervisor(process: Any, found: Found) -> None:
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    found.kills["supervisor"] += 1
    process.wait(30)
    _, alive = psutil.wait_procs(children, timeout=20)
    for child in alive:
        found.wrong.append(f"outlives its supervisor: {' '.join(child.cmdline())[:200]}")
        child.kill()


def check_left(artifact: Path, temporary: Path, sums: str, found: Found) -> None:
    """One more server, ended in order: it answers as before the kills, and tidies up behind them."""
    from serving_server import running

    from optc.compiler.artifact.folder import verify
    from optc.runtime.serving.settings import ServeOptions

    opener = "optc.runtime.serving.engine_process:open_artifact"
    with running(artifact, ServeOptions(), opener=opener, environment={"TMPDIR": str(temporary)}) as server:
        if ask(server.port, 0, stream=False)[0] != "answered":
            found.wrong.append("the server after all kills does not answer")
        if (code := server.end()) != 0:
            found.wrong.append(f"the server after all kills ends with {code}")
    left = sorted(path.name for path in temporary.glob("optc-serve-*"))
    if left:
        found.wrong.append(f"left in the temporary folder: {left}")
    if verify(artifact).self_sha256 != sums:
        found.wrong.append("the artifact is another one")


def main() -> int:
    """The command line; 1 where something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for seeds, kept between runs")
    parser.add_argument("--servers", type=int, default=5, help="7 kills each")
    parser.add_argument("--minutes", type=float, default=1e6, help="no server begins after this time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    from optc.compiler.artifact.folder import verify

    work = options.work.resolve()
    temporary = work / "tmp"
    temporary.mkdir(parents=True, exist_ok=True)
    artifact = Seeds(work).compiled("target-onnx-cpu", "--target", "onnx-cpu")
    sums, found, chance = verify(artifact).self_sha256, Found(), random.Random(options.seed)
    begin, expected, servers = time.monotonic(), list[str](), 0
    while servers < options.servers and time.monotonic() < begin + 60 * options.minutes:
        kill_one_server(artifact, temporary, expected, chance, found)
        servers += 1
        print(f"{servers} servers: {found.kills.total()} kills, {dict(found.requests)}, {found.wrong}", flush=True)
    check_left(artifact, temporary, sums, found)
    result = {"servers": servers, **found.to_dict(), "seconds": round(time.monotonic() - begin, 1)}
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if found.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
