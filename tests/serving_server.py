"""Servers for tests: processes as `optc serve` starts them, with the fake engine or a real one, and small clients."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from artifacts import make_manifest
from conftest import EXAMPLE, ROOT
from once import once

from optc.compiler.artifact.folder import finish, write_folder
from optc.compiler.ir.contract import Contract, ModelFacts
from optc.runtime.generation.tokenizer import Tokenizer, load_tokenizer
from optc.runtime.serving.settings import ServeOptions, ServerConfig

TEMPLATE = (
    "{% if tools %}Tools: {{ tools | tojson }} say <tool_call>{{ '{' }}{{ '}' }}</tool_call>\n{% endif %}"
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
_START_SECONDS = 120.0


def text_artifact() -> Path:
    """An artifact of nothing but the example's tokenizer and a chat template, for the fake engine."""

    def make(folder: Path) -> None:
        with write_folder(folder / "artifact", force=False) as directory:
            for name in ("tokenizer.json", "config.json", "generation_config.json"):
                shutil.copyfile(EXAMPLE / name, directory / name)
            config = json.loads((EXAMPLE / "tokenizer_config.json").read_text())
            (directory / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
            model = ModelFacts(vocab_size=8192, context_length=2048)
            finish(
                directory,
                make_manifest(contract=Contract(kind="decoder", inputs=(), outputs=(), model=model), files=()),
            )

    return once("serving-text", make) / "artifact"


def example_tokenizer() -> Tokenizer:
    found = load_tokenizer(EXAMPLE)
    assert found is not None
    return found


class Server:
    """A server's process. `events` are the objects that it has printed."""

    def __init__(
        self,
        folder: Path,
        options: ServeOptions,
        *,
        opener: str = "serving_fake_engine:open_fake",
        keys: tuple[str, ...] = (),
        environment: dict[str, str] | None = None,
    ) -> None:
        options = msgspec.structs.replace(options, port=0)
        config = ServerConfig(folder=folder, name="model", options=options, opener=opener, api_keys=keys)
        path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "serving_driver.py"), msgspec.json.encode(config, enc_hook=str)],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **(environment or {})},
            stdout=subprocess.PIPE,
            text=True,
        )
        self.events: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        text = ""
        for line in self.process.stdout:
            text += line
            with contextlib.suppress(ValueError):  # an error is printed over several lines
                self.events.append(json.loads(text))
                text = ""

    def wait_for(self, event: str, count: int = 1) -> dict[str, Any]:
        """The particulars of an event, once it has come `count` times."""
        end = time.monotonic() + _START_SECONDS
        while time.monotonic() < end:
            found = [item for item in self.events if item.get("event") == event]
            if len(found) >= count:
                return found[-1]
            assert self.process.poll() is None or self._reader.is_alive(), self.events
            time.sleep(0.01)
        raise AssertionError(f"no {event}: {self.events}")

    @property
    def port(self) -> int:
        return int(self.wait_for("ready")["url"].rpartition(":")[2])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def children(self) -> dict[str, int]:
        """Process ids by kind: engine, worker."""
        found = subprocess.run(
            ["ps", "-o", "pid=,args=", "--ppid", str(self.process.pid)], capture_output=True, text=True, check=False
        ).stdout
        rows = [line.split(None, 1) for line in found.splitlines()]
        kinds = {"engine_process": "engine", "http.worker": "worker"}
        return {kind: int(pid) for pid, text in rows for part, kind in kinds.items() if part in text}

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and wait; the exit code."""
        self.process.send_signal(number)
        code = self.process.wait(60)
        self._reader.join(10)
        return code

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        """(status, JSON or text, headers). A body of bytes is sent as it is."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, data, {"content-type": "application/json", **(headers or {})})
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        kind = answer.headers.get("content-type", "")
        return answer.status, json.loads(text) if kind == "application/json" else text, dict(answer.headers.items())

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        return self.request("POST", path, body)[:2]

    def raw(self, data: bytes, *, seconds: float = 20.0) -> bytes:
        """What the server says to these bytes until it closes or has been silent."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=seconds) as connection:
            connection.sendall(data)
            found = b""
            with contextlib.suppress(TimeoutError, ConnectionResetError):
                while piece := connection.recv(1 << 16):
                    found += piece
            return found

    def metric(self, name: str) -> float:
        """A value of /metrics without labels, or with them as they stand there; 0 where it is not there yet."""
        rows = [line.rpartition(" ") for line in self.request("GET", "/metrics")[1].splitlines()]
        return next((float(value) for key, _, value in rows if key == name), 0.0)

    def settled(self, name: str, value: float, seconds: float = 30.0) -> float:
        """A metric once it has this value, or after a while whatever it has."""
        end = time.monotonic() + seconds
        while (found := self.metric(name)) != value and time.monotonic() < end:
            time.sleep(0.05)
        return found


@contextlib.contextmanager
def running(*arguments: Any, **named: Any) -> Iterator[Server]:
    """A server that is ready; killed at the end where the test has not ended it."""
    server = Server(*arguments, **named)
    try:
        server.wait_for("ready")
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait(30)


def refusal(answer: tuple[int, Any], status: int) -> dict[str, Any]:
    """The error of a refusal, which must have OpenAI's form."""
    found, body = answer[:2]
    assert found == status, answer
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    error: dict[str, Any] = body["error"]
    return error
