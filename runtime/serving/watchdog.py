"""Whether the engine's process still answers: one that hangs looks from outside like one that works."""

from __future__ import annotations

import asyncio
import contextlib

from optc.runtime.serving.request import EngineInfo
from optc.runtime.serving.settings import ServeOptions
from optc.runtime.serving.wire import Frames, Ping, Pong, decode_from_engine, frame

_READ = 1 << 16
_EVERY = 5.0  # seconds between an answer and the next question
_BOUNDED_STEP = 120.0  # seconds that are more than enough for a step of a bounded number of tokens


def patience(options: ServeOptions, info: EngineInfo) -> float:
    """Seconds without an answer after which an engine hangs.

    It answers between two steps. Where these have a budget of tokens, they are short. Elsewhere a step may be a whole
    prompt, and all that is known is that nobody waits for longer than a request may take.
    """
    if options.engine_seconds is not None:
        return options.engine_seconds
    whole_prompts = info.serves == "one-at-a-time"
    return options.request_seconds if whole_prompts else min(_BOUNDED_STEP, options.request_seconds)


async def stops_answering(path: str, seconds: float) -> bool:
    """Ask the engine behind a socket again and again: True once it has not answered for so long, False once it is gone."""
    reader, writer = await asyncio.open_unix_connection(path)
    frames = Frames()
    try:
        while True:
            writer.write(frame(Ping()))
            try:
                async with asyncio.timeout(seconds):
                    await _pong(reader, frames)
            except TimeoutError:
                return True
            except (EOFError, ConnectionError):
                return False
            await asyncio.sleep(min(_EVERY, seconds / 4))
    finally:
        with contextlib.suppress(OSError):
            writer.close()


async def _pong(reader: asyncio.StreamReader, frames: Frames) -> None:
    """Read until the answer; what the engine tells every client comes between.

    Raises:
        EOFError: it is gone.
    """
    while True:
        data = await reader.read(_READ)
        if not data:
            raise EOFError
        if any(isinstance(decode_from_engine(item), Pong) for item in list(frames.feed(data))):
            return
