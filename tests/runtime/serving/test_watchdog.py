"""The watchdog beside engines that answer, are slow, hang and die."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving_fake_engine import FakeEngine

from optc.runtime.serving.engine_process import EngineServer
from optc.runtime.serving.request import EngineInfo, Serves
from optc.runtime.serving.settings import ServeOptions
from optc.runtime.serving.watchdog import patience, stops_answering


@contextlib.contextmanager
def serving(path: Path, turns: float, pause: float = 0.0) -> Iterator[None]:
    """An engine's server that takes so many turns, each followed by a pause, and then none; it ends when this does."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        server, ended = EngineServer(FakeEngine(ServeOptions(), 9, 8), listener), threading.Event()

        def run() -> None:
            count = 0
            while count < turns and not ended.is_set():
                server.turn()
                count += 1
                time.sleep(pause)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        yield
        ended.set()
        with socket.socket(socket.AF_UNIX) as wakes:
            wakes.connect(str(path))
        thread.join(5)


async def _for(seconds: float, path: Path, allowed: float) -> bool | None:
    """What the watchdog says within these seconds; None for nothing."""
    try:
        return await asyncio.wait_for(stops_answering(str(path), allowed), seconds)
    except TimeoutError:
        return None


def test_an_engine_that_answers_is_left_alone(tmp_path: Path) -> None:
    """Slow steps, too, as long as each is shorter than what is allowed."""
    with serving(tmp_path / "e", turns=float("inf"), pause=0.1):
        assert asyncio.run(_for(4.0, tmp_path / "e", 3.0)) is None


@pytest.mark.parametrize("turns", [0, 4])
def test_an_engine_that_hangs(tmp_path: Path, turns: int) -> None:
    """From the start, before it has taken the connection; and after some answers."""
    with serving(tmp_path / "e", turns=turns):
        begin = time.monotonic()
        assert asyncio.run(_for(10, tmp_path / "e", 0.3)) is True
        assert 0.3 <= time.monotonic() - begin < 10


def test_an_engine_that_is_gone(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "e"))
        listener.listen()

        def end() -> None:
            listener.accept()[0].close()

        thread = threading.Thread(target=end, daemon=True)
        thread.start()
        assert asyncio.run(_for(10, tmp_path / "e", 5)) is False
        thread.join(5)


@pytest.mark.parametrize(
    ("serves", "options", "seconds"),
    [
        ("continuous", ServeOptions(), 120),
        ("rows", ServeOptions(request_seconds=9), 9),
        ("one-at-a-time", ServeOptions(), 600),
        ("continuous", ServeOptions(engine_seconds=3), 3),
        ("one-at-a-time", ServeOptions(engine_seconds=900), 900),
    ],
)
def test_how_long_an_engine_may_be_silent(serves: Serves, options: ServeOptions, seconds: float) -> None:
    info = EngineInfo(vocab_size=1, context_length=1, serves=serves, max_running=1, max_waiting=1)
    assert patience(options, info) == seconds
