"""Processes of a server: what clients are told when one dies, restarts, drains, and that none is left behind."""

from __future__ import annotations

import concurrent.futures
import http.client
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from serving_fake_engine import BREAK, next_token
from serving_server import Server, example_tokenizer, refusal, running, text_artifact

from optc.compiler.diagnostics import InputError
from optc.runtime.serving.settings import ServeOptions
from optc.runtime.serving.supervisor import MOST_DEATHS, listen_http

TOKENS = example_tokenizer()
SLOW = {"OPTC_FAKE_STEP": "0.02"}


class Stream:
    """A completion that is being streamed, read event by event."""

    def __init__(self, server: Server, **body: Any) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        data = json.dumps({"prompt": "x", "stream": True, **body})
        self.connection.request("POST", "/v1/completions", data, {"content-type": "application/json"})
        self.answer = self.connection.getresponse()
        self.text, self.error, self.ended = "", None, False

    def read(self) -> bool:
        """Take the next event; whether there was one."""
        line = self.answer.readline().strip()
        while line == b"" and not self.answer.isclosed():
            line = self.answer.readline().strip()
        if not line or line == b"data: [DONE]":
            self.ended = line != b""
            return False
        event = json.loads(line.removeprefix(b"data: "))
        if "error" in event:
            self.error = event["error"]
            return False
        self.text += event["choices"][0]["text"]
        return True

    def rest(self) -> None:
        """All further events."""
        while self.read():
            pass


def test_the_engine_is_killed(tmp_path: Path) -> None:
    with running(text_artifact(), ServeOptions(max_running=4, engine_seconds=5), environment=SLOW) as server:
        assert b"OMP_WAIT_POLICY=" in Path(f"/proc/{server.children()['engine']}/environ").read_bytes()
        streams = [Stream(server, max_tokens=1000) for _ in range(4)]
        for stream in streams:
            assert stream.read()
        with concurrent.futures.ThreadPoolExecutor(2) as threads:
            waiting = threads.submit(server.post, "/v1/completions", {"prompt": "x", "max_tokens": 5})
            server.settled("optc_requests_waiting", 1)
            begin = time.monotonic()
            os.kill(server.children()["engine"], signal.SIGKILL)
            for stream in streams:
                stream.rest()
                assert stream.error is not None
                assert (stream.error["code"], stream.ended) == ("engine_lost", False)
            assert refusal(waiting.result(), 503)["code"] == "engine_lost"
        assert time.monotonic() - begin < 10
        server.wait_for("restarted")
        while server.request("GET", "/health")[0] != 200:
            time.sleep(0.01)
        found = server.post("/v1/completions", {"prompt": "The old man", "max_tokens": 3})[1]["choices"][0]["text"]
        prompt = TOKENS.encode("The old man")
        assert found == TOKENS.decode([next_token(prompt, index) for index in range(3)])
        assert server.metric("optc_engine_starts_total") == 2
        assert server.metric("optc_requests_running") == 0
        assert server.wait_for("died")["why"] == "killed by SIGKILL"
        # a worker, too: the engine drops what it had asked for, and a new one takes its place
        stream = Stream(server, max_tokens=2000)
        assert stream.read()
        os.kill(server.children()["worker"], signal.SIGKILL)
        server.wait_for("restarted", 2)
        assert server.settled("optc_requests_running", 0) == 0
        # an engine that says itself that it cannot go on
        assert refusal(server.post("/v1/completions", {"prompt": [5, BREAK]}), 503)["code"] == "engine_lost"
        server.wait_for("restarted", 3)
        assert server.wait_for("died", 3)["why"] == "out of memory on the device"
        # an engine that hangs
        while server.request("GET", "/health")[0] != 200:
            time.sleep(0.01)
        begin = time.monotonic()
        os.kill(server.children()["engine"], signal.SIGSTOP)
        assert refusal(server.post("/v1/completions", {"prompt": "x"}), 503)["code"] == "engine_lost"
        assert 4 < time.monotonic() - begin < 20
        assert server.wait_for("died", 4)["why"] == "it did not answer for 5 seconds, and was killed"
        server.wait_for("restarted", 4)
        assert server.end() == 0


def test_an_engine_that_cannot_start_ends_the_server() -> None:
    server = Server(text_artifact(), ServeOptions(), environment={"OPTC_FAKE_REFUSES": "1"})
    assert server.process.wait(60) == 8
    server._reader.join(10)
    assert [item["what"] for item in server.events if "what" in item] == ["no memory for the pool"]


def test_a_crash_loop_ends(capfd: pytest.CaptureFixture[str]) -> None:
    server = Server(text_artifact(), ServeOptions(), environment={"OPTC_FAKE_CRASHES": "1"})
    assert server.process.wait(60) == 8
    server._reader.join(10)
    assert [item["event"] for item in server.events if "event" in item] == ["died"] * (MOST_DEATHS + 1)
    assert server.events[-1]["what"] == "the engine process ended 4 times within 300 seconds"
    assert "killed by SIGKILL" in capfd.readouterr().err


def test_a_port_that_is_taken(tmp_path: Path) -> None:
    with running(text_artifact(), ServeOptions(drain_seconds=0)) as server:
        with pytest.raises(InputError, match=r"cannot listen on 127\.0\.0\.1"):
            listen_http("127.0.0.1", server.port)
        # a stream that is longer than the drain is told so
        stream = Stream(server, max_tokens=2000)
        server.process.send_signal(signal.SIGINT)
        stream.rest()
        assert stream.error is None or stream.error["code"] == "shutting_down"
        assert server.process.wait(30) == 0


@pytest.mark.parametrize(("seconds", "whole"), [(30.0, True), (0.2, False)])
def test_a_drain_lets_what_runs_finish(seconds: float, whole: bool) -> None:
    with running(text_artifact(), ServeOptions(drain_seconds=seconds), environment=SLOW) as server:
        stream = Stream(server, max_tokens=60)
        idle = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        idle.request("GET", "/health")
        assert idle.getresponse().read()
        assert stream.read()
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("draining")
        time.sleep(0.15)
        with pytest.raises(ConnectionRefusedError):
            server.request("GET", "/health")  # nobody listens any more
        stream.rest()
        prompt = TOKENS.encode("x")
        text = TOKENS.decode([next_token(prompt, index) for index in range(60)])
        assert stream.ended == whole
        assert (stream.text == text) == whole
        assert whole or (stream.error is not None and stream.error["code"] == "shutting_down")
        assert server.process.wait(30) == 0
        server._reader.join(10)
        assert [item["event"] for item in server.events] == ["ready", "draining", "stopped"]


def test_nothing_outlives_a_supervisor_that_is_killed() -> None:
    with running(text_artifact(), ServeOptions(), environment=SLOW) as server:
        children = [psutil.Process(pid) for pid in server.children().values()]
        assert len(children) == 2
        stream = Stream(server, max_tokens=2000)
        assert stream.read()
        server.process.kill()
        assert psutil.wait_procs(children, timeout=10)[1] == []
