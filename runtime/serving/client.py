"""The engine as an API process sees it: requests go out, answers come back to whoever waits for them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from optc.runtime.serving.request import (
    Answer,
    Cancel,
    Embed,
    EngineInfo,
    EngineMetrics,
    Finish,
    Generate,
    TokenLogprobs,
)
from optc.runtime.serving.wire import Frames, FromEngine, Given, Measured, Opened, Refused, decode_from_engine, frame

_READ = 1 << 18


class EngineGoneError(Exception):
    """The engine's process has ended, or is not ready yet."""


class EngineBusyError(Exception):
    """The engine has too many requests waiting."""


class EngineRefusedError(Exception):
    """The engine does not take the request, for what it says."""


@dataclass(slots=True)
class Pending:
    """What one request got and nobody has read yet; answers are merged, so a slow reader costs no more than its tokens."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: Finish | None = None
    cached_tokens: int | None = None
    error: str = ""
    embeddings: bytearray = field(default_factory=bytearray)

    def add(self, answer: Answer) -> None:
        self.tokens += answer.tokens
        self.logprobs += answer.logprobs or ()
        self.embeddings += answer.embeddings
        self.finish, self.error = answer.finish, answer.error
        if answer.cached_tokens is not None:
            self.cached_tokens = answer.cached_tokens


class Channel:
    """Requests of one HTTP request, and their answers."""

    def __init__(self, client: EngineClient, requests: Sequence[Generate | Embed]) -> None:
        self._client = client
        self._indices = {request.id: index for index, request in enumerate(requests)}
        self._ids = [request.id for request in requests]
        self._pending: dict[int, Pending] = {}
        self._failure: Exception | None = None
        self._news = asyncio.Event()

    def push(self, answer: Answer) -> None:
        """Called by the client as answers come."""
        self._pending_of(answer.id).add(answer)
        self._news.set()

    def push_tokens(self, identity: str, tokens: list[int]) -> None:
        """Called by the client as tokens come, and nothing else, for a request that goes on."""
        self._pending_of(identity).tokens += tokens
        self._news.set()

    def _pending_of(self, identity: str) -> Pending:
        index = self._indices[identity]
        found = self._pending.get(index)
        if found is None:
            found = self._pending[index] = Pending()
        return found

    def fail(self, error: Exception) -> None:
        """Let `next` raise this; the first one counts."""
        self._failure = self._failure or error
        self._news.set()

    async def next(self) -> dict[int, Pending]:
        """What came since the last call, by the index of its request; waits for something.

        Raises:
            Exception: what `fail` was given.
        """
        await self._news.wait()
        self._news.clear()
        if self._failure is not None:
            self._news.set()
            raise self._failure
        found, self._pending = self._pending, {}
        return found

    def cancel(self, index: int) -> None:
        """End one request, unless it has ended; nothing more comes of it."""
        self._client.cancel(self._ids[index])

    def close(self) -> None:
        """End all requests."""
        for identity in self._ids:
            self._client.cancel(identity)


class EngineClient:
    """The connection to the engine, made again whenever there is a new engine.

    Args:
        path: of the engine's socket.
        on_opened: called when an engine is there.
    """

    def __init__(self, path: str, on_opened: Callable[[EngineInfo], None]) -> None:
        self._path, self._on_opened = path, on_opened
        self._prefix = f"{os.getpid()}-"
        self._numbers = itertools.count()
        self._channels: dict[str, Channel] = {}
        self._writer: asyncio.StreamWriter | None = None
        self.info: EngineInfo | None = None
        self.metrics: EngineMetrics | None = None

    @property
    def open_requests(self) -> int:
        return len(self._channels)

    def new_id(self) -> str:
        """An id that no other request of any process has."""
        return self._prefix + str(next(self._numbers))

    async def run(self) -> None:
        """Keep a connection to whatever engine is there; ends only when it is cancelled."""
        while True:
            try:
                reader, self._writer = await asyncio.open_unix_connection(self._path)
            except OSError:  # the supervisor is gone, and soon this process is
                await asyncio.sleep(0.05)
                continue
            await self._follow(reader)
            self._writer.close()
            self._lose()

    async def _follow(self, reader: asyncio.StreamReader) -> None:
        frames = Frames()
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(_READ):
                for item in frames.feed(data):
                    self._receive(decode_from_engine(item))

    def _lose(self) -> None:
        """All requests are lost with the engine; who waits for them is told at once."""
        self.info = self.metrics = None
        channels, self._channels = set(self._channels.values()), {}
        for channel in channels:
            channel.fail(EngineGoneError())

    def _receive(self, message: FromEngine) -> None:
        match message:
            case Given():
                self._pass_on(message)
            case Refused(id=identity, why=why, message=text):
                channel = self._channels.pop(identity, None)
                if channel is not None:
                    channel.fail(EngineBusyError(text) if why == "busy" else EngineRefusedError(text))
            case Opened(info):
                self.info = info
                self._on_opened(info)
            case Measured(metrics):
                self.metrics = metrics
            case _:
                raise AssertionError("an answer to what was not asked")

    def _pass_on(self, given: Given) -> None:
        """What a step gave, to whoever waits for it."""
        tokens, end = np.frombuffer(given.tokens, np.int32).tolist(), 0
        for name, count in zip(given.ids, np.frombuffer(given.counts, np.int32).tolist(), strict=True):
            end += count
            channel = self._channels.get(name)
            if channel is not None:
                channel.push_tokens(name, tokens[end - count : end])
        for answer in given.others:
            channel = self._channels.get(answer.id)
            if channel is not None:
                channel.push(answer)
                if answer.finish is not None:
                    del self._channels[answer.id]

    def submit(self, requests: Sequence[Generate | Embed]) -> Channel:
        """Send requests; the channel gives their answers.

        Raises:
            EngineGoneError: there is no engine now.
        """
        if self.info is None or self._writer is None:
            raise EngineGoneError
        channel = Channel(self, requests)
        for request in requests:
            self._channels[request.id] = channel
            self._writer.write(frame(request))
        return channel

    def cancel(self, identity: str) -> None:
        """End a request, unless it has ended."""
        if self._channels.pop(identity, None) is not None and self._writer is not None:
            self._writer.write(frame(Cancel(id=identity)))

    def fail_all(self, error: Exception) -> None:
        """Let everybody who waits know that this is the end."""
        for channel in set(self._channels.values()):
            channel.fail(error)
