"""From an HTTP request to the engine's answers: whoever leaves, waits too long or loses the engine is dealt with here."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

from starlette.types import Receive

from optc.runtime.serving.client import Channel, EngineBusyError, EngineGoneError, EngineRefusedError, Pending
from optc.runtime.serving.http.errors import HttpError, engine_lost, no_engine, timed_out
from optc.runtime.serving.http.state import ServerState
from optc.runtime.serving.request import Embed, Generate


class ClientLeftError(Exception):
    """Nobody waits for the answer any more."""


@contextlib.asynccontextmanager
async def asking(state: ServerState, requests: Sequence[Generate | Embed], receive: Receive) -> AsyncIterator[Channel]:
    """Requests, given to the engine; when this ends, so do they there, however it ends.

    Raises:
        HttpError: 503, there is no engine.
    """
    try:
        channel = state.client.submit(requests)
    except EngineGoneError as error:
        raise no_engine() from error
    watcher = asyncio.create_task(_watch(receive, channel))
    limit = state.options.request_seconds
    timer = asyncio.get_running_loop().call_later(limit, channel.fail, timed_out(limit))
    try:
        yield channel
    finally:
        timer.cancel()
        watcher.cancel()
        channel.close()


async def _watch(receive: Receive, channel: Channel) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    channel.fail(ClientLeftError())


async def news(channel: Channel) -> dict[int, Pending]:
    """What came since the last call, by the index of its request; waits for something.

    Raises:
        HttpError: the requests end with an error.
        ClientLeftError: they end with nobody there.
    """
    try:
        return await channel.next()
    except EngineGoneError as error:
        raise engine_lost() from error
    except EngineBusyError as error:
        raise HttpError(429, str(error), code="queue_full") from error
    except EngineRefusedError as error:
        raise HttpError(400, str(error), code="invalid_request") from error
