"""An API process: uvicorn on the socket that the supervisor holds, and the connection to the engine."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import Iterator
from functools import partial

import uvicorn
import uvloop

from optc.runtime.serving.child import Child, Drain, Order, Ready, run_child
from optc.runtime.serving.http.app import build_app
from optc.runtime.serving.http.errors import stopping
from optc.runtime.serving.http.guard import GuardedProtocol
from optc.runtime.serving.http.state import ServerState

_LAST_SECONDS = 1.0  # for the last words to clients after a drain has run out


class _Server(uvicorn.Server):
    """uvicorn's, without its handlers of signals: the supervisor says when it ends."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Worker:
    """One API process."""

    def __init__(self, child: Child, listener: socket.socket) -> None:
        self._child, self._listener = child, listener
        self._state = ServerState(child.config)
        protocol = type("Protocol", (GuardedProtocol,), {"most_connections": child.config.options.max_connections})
        self._server = _Server(
            uvicorn.Config(
                build_app(self._state),
                http=protocol,
                ws="none",
                lifespan="off",
                access_log=False,
                log_level="error",
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=30,
            )
        )
        self._drains: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Serve until the supervisor orders to drain.

        Raises:
            InputError: the artifact's tokenizer or template cannot be used.
        """
        loop = asyncio.get_running_loop()
        self._child.listen(lambda order: loop.call_soon_threadsafe(partial(self._on_order, order)))
        engine = loop.create_task(self._state.client.run())
        ready = loop.create_task(self._tell())
        await self._server.serve(sockets=[self._listener])
        for task in (engine, ready):
            task.cancel()
        if self._state.fault is not None:
            raise self._state.fault

    async def _tell(self) -> None:
        await self._state.opened.wait()
        if self._state.fault is not None:
            self._server.should_exit = True
        else:
            self._child.report(Ready())

    def _on_order(self, order: Order) -> None:
        self._drains.add(asyncio.get_running_loop().create_task(self._drain(order)))

    async def _drain(self, order: Drain) -> None:
        """No new requests; those that run may finish, and are told when they may not."""
        self._state.draining = True
        self._server.should_exit = True
        loop = asyncio.get_running_loop()
        deadline = loop.time() + order.seconds
        while self._state.client.open_requests and loop.time() < deadline:
            await asyncio.sleep(0.02)
        self._state.client.fail_all(stopping())
        await asyncio.sleep(_LAST_SECONDS)
        self._server.force_exit = True


def main(child: Child) -> None:
    """Serve HTTP."""
    listener = socket.socket(fileno=int(sys.argv[2]))

    async def body() -> None:
        await Worker(child, listener).run()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(body())


if __name__ == "__main__":
    run_child(main, "worker")
