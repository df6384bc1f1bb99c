"""The process of the engine: takes requests of all API processes, runs steps, and sends each its answers."""

from __future__ import annotations

import gc
import importlib
import selectors
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from optc.compiler.diagnostics import BusyError, InputError, UsageError
from optc.runtime.serving.answers import Answers
from optc.runtime.serving.child import Child, Ready, run_child
from optc.runtime.serving.interface import Runs
from optc.runtime.serving.request import Answer, Cancel, Embed, Generate, Task
from optc.runtime.serving.settings import ServeOptions, ServerConfig
from optc.runtime.serving.wire import (
    Frames,
    FromEngine,
    Given,
    Measured,
    Opened,
    Ping,
    Pong,
    Refused,
    ToEngine,
    decode_to_engine,
    frame,
)

_MEASURED_EVERY = 0.2  # seconds between two `Measured` while steps run
_READ = 1 << 18
_TAKES: dict[Task, type[Generate | Embed]] = {"generate": Generate, "embed": Embed}


class Client:
    """One connection of an API process. Writing never waits: what the socket does not take is kept."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.socket = connection
        self.requests: set[str] = set()
        self.unsent = bytearray()
        self._frames = Frames()

    def read(self) -> Iterator[ToEngine]:
        """Messages that have come.

        Raises:
            EOFError: the process is gone, or sends what is no message.
        """
        try:
            data = self.socket.recv(_READ)
        except BlockingIOError:
            return
        except OSError as error:
            raise EOFError from error
        if not data:
            raise EOFError
        try:
            for item in self._frames.feed(data):
                yield decode_to_engine(item)
        except (ValueError, msgspec.MsgspecError) as error:
            raise EOFError from error

    def send(self, message: FromEngine) -> None:
        """Send a message, now or when the socket takes it. A process that is gone is noticed by `read`."""
        self.unsent += frame(message)
        self.flush()

    def flush(self) -> None:
        """Send what the socket takes."""
        try:
            while self.unsent:
                del self.unsent[: self.socket.send(self.unsent)]
        except BlockingIOError:
            return
        except OSError:
            self.unsent.clear()


class EngineServer:
    """An engine and those who ask it."""

    def __init__(self, engine: Runs[Any], listener: socket.socket) -> None:
        self._engine, self._listener = engine, listener
        self._selector = selectors.DefaultSelector()
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ)
        self._clients: set[Client] = set()
        self._owners: dict[str, Client] = {}
        self._measured = 0.0

    def run(self) -> None:
        """Serve until the process ends.

        Raises:
            OptcError: the engine cannot go on.
        """
        while True:
            self.turn()

    def turn(self) -> None:
        """Take what has come, waiting for it where there is nothing to run; then run one step."""
        for key, events in self._selector.select(0 if not self._engine.idle else None):
            if key.data is None:
                self._accept()
                continue
            if events & selectors.EVENT_WRITE:
                key.data.flush()
                self._watch(key.data)
            if events & selectors.EVENT_READ:
                self._take(key.data)
        if not self._engine.idle:
            self._give(self._engine.step())
        self._measure()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):
            return
        client = Client(connection)
        self._clients.add(client)
        self._selector.register(connection, selectors.EVENT_READ, client)
        self._send(client, Opened(self._engine.info))
        self._send(client, Measured(self._engine.metrics()))

    def _take(self, client: Client) -> None:
        try:
            for message in client.read():
                if isinstance(message, Cancel):
                    self._engine.cancel(message.id)
                elif isinstance(message, Ping):
                    self._send(client, Pong())
                else:
                    self._submit(client, message)
        except EOFError:
            self._drop(client)

    def _submit(self, client: Client, request: Generate | Embed) -> None:
        if not isinstance(request, _TAKES[self._engine.info.task]):
            self._send(client, Refused(id=request.id, why="input", message="the engine runs requests of another kind"))
            return
        try:
            self._engine.submit(request)
        except BusyError as error:
            self._send(client, Refused(id=request.id, why="busy", message=error.what))
        except (InputError, UsageError) as error:
            message = f"{error.what}: {error.why}" if error.why else error.what
            self._send(client, Refused(id=request.id, why="input", message=message))
        else:
            self._owners[request.id] = client
            client.requests.add(request.id)

    def _drop(self, client: Client) -> None:
        """A process is gone: nobody waits for its requests."""
        self._selector.unregister(client.socket)
        client.socket.close()
        self._clients.discard(client)
        for identity in client.requests:
            self._engine.cancel(identity)
            del self._owners[identity]

    def _give(self, answers: Answers) -> None:
        """Each client its requests' part; what is of nobody's is dropped."""
        places: defaultdict[Client, list[int]] = defaultdict(list)
        for place, client in enumerate(map(self._owners.get, answers.ids)):
            if client is not None:
                places[client].append(place)
        others: defaultdict[Client, list[Answer]] = defaultdict(list)
        for answer in answers.others:
            client = self._owners.get(answer.id)
            if client is None:
                continue
            others[client].append(answer)
            if answer.finish is not None:
                del self._owners[answer.id]
                client.requests.discard(answer.id)
        for client in places.keys() | others.keys():
            own = answers.only(places[client], others[client])
            counts = own.counts.astype(np.int32).tobytes()
            self._send(client, Given(own.ids, own.tokens.tobytes(), counts, own.others))

    def _measure(self) -> None:
        now = time.monotonic()
        if self._engine.idle or now - self._measured >= _MEASURED_EVERY:
            self._measured = now
            message = Measured(self._engine.metrics())
            for client in self._clients:
                self._send(client, message)

    def _send(self, client: Client, message: FromEngine) -> None:
        client.send(message)
        self._watch(client)

    def _watch(self, client: Client) -> None:
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if client.unsent else 0)
        if self._selector.get_key(client.socket).events != events:
            self._selector.modify(client.socket, events, client)


def open_by_name(config: ServerConfig) -> Runs[Any]:
    """The engine that `config.opener` opens."""
    module, _, name = config.opener.partition(":")
    opener: Callable[..., Runs[Any]] = getattr(importlib.import_module(module), name)
    return opener(config.folder, config.options)


def open_artifact(folder: Path, options: ServeOptions) -> Runs[Any]:
    """The engine of an artifact."""
    from optc.compiler.artifact.folder import read_manifest
    from optc.runtime.serving.embedding_engine import open_embedding_engine
    from optc.runtime.serving.engine import open_engine
    from optc.runtime.serving.engine_options import EngineOptions
    from optc.runtime.speculative.settings import speculation_of

    chosen = EngineOptions(
        max_running=options.max_running,
        max_waiting=options.max_waiting,
        token_budget=options.token_budget,
        threads=options.threads,
        num_blocks=options.kv_blocks,
        speculation=speculation_of(options.speculative, options.draft, options.draft_tokens, options.draft_shape),
        trust=options.trust,
        warm_up=True,
        dequantized_copies=not options.save_memory,
    )
    if read_manifest(folder).contract.embedding is not None:
        return open_embedding_engine(folder, chosen)
    return open_engine(folder, options=chosen)


def main(child: Child) -> None:
    """Open the engine, say so, and serve."""
    listener = socket.socket(fileno=int(sys.argv[2]))
    child.listen(lambda order: None)  # it has no orders: it ends when its parent closes the stream
    engine = open_by_name(child.config)
    gc.collect()
    gc.freeze()  # the model and its libraries stay: no later collection looks at them
    server = EngineServer(engine, listener)
    child.report(Ready(info=engine.info))
    server.run()


if __name__ == "__main__":
    run_child(main, "engine")
