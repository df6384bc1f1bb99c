"""uvicorn's HTTP/1.1 protocol, with bounds for clients that are slow, many, or mean harm."""

from __future__ import annotations

import asyncio
from asyncio import TimerHandle
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from optc.runtime.serving.http.errors import HttpError

HEAD_BYTES = 32 << 10
"""Of a request line with its headers."""

HEAD_SECONDS = 15.0
"""Until a request's headers are there, from the first byte or from the connection's start."""

STALLED_SECONDS = 60.0
"""A client that reads nothing of its answer for so long is let go, with what was kept for it."""

_PIPELINED = 16  # requests on one connection before the first is answered


def _too_long() -> HttpError:
    return HttpError(431, f"the headers have more than {HEAD_BYTES} bytes")


class GuardedProtocol(HttpToolsProtocol):
    """Refuses connections beyond a number, heads that are too long or too slow, and readers that stand still."""

    most_connections: ClassVar[int] = 4096
    head_seconds: ClassVar[float] = HEAD_SECONDS
    stalled_seconds: ClassVar[float] = STALLED_SECONDS

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._head_bytes = 0  # that have come while a head is read; pipelined ones count as they are parsed
        self._parsed_bytes = 0
        self._in_head = True
        self._head_timer: TimerHandle | None = None
        self._stall_timer: TimerHandle | None = None
        self._running: RequestResponseCycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.most_connections:
            self.refuse(HttpError(503, "too many connections are open", code="too_many_connections"))
        else:
            self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel(self._head_timer, self._stall_timer)
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True  # uvicorn tells only the last of several pipelined requests
            self._running.message_event.set()
        self.pipeline.clear()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_timer is None:
                self._expect_head()
        super().data_received(data)
        if self._in_head and self._head_bytes > HEAD_BYTES:
            self.refuse(_too_long())
        elif len(self.pipeline) > _PIPELINED:
            self.transport.abort()

    def on_message_begin(self) -> None:
        self._in_head, self._head_bytes, self._parsed_bytes = True, 0, 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._parsed_bytes += len(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._parsed_bytes += len(name) + len(value) + 4
        if self._parsed_bytes <= HEAD_BYTES:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head, self._head_bytes = False, 0
        self._cancel(self._head_timer)
        self._head_timer = None
        if self._parsed_bytes > HEAD_BYTES:  # all of it came at once
            self.refuse(_too_long())
        else:
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_head = True

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def send_400_response(self, msg: str) -> None:
        self.refuse(HttpError(400, msg.rstrip("."), code="invalid_http"))

    def refuse(self, error: HttpError) -> None:
        """Answer without a request, and close."""
        if self.transport.is_closing():
            return
        running = self._running
        if running is not None and running.response_started and not running.response_complete:
            self.transport.abort()  # in the middle of an answer, where another would be read as part of it
            return
        body = error.body()
        head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[error.status] + head + body)
        self.transport.close()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._cancel(self._stall_timer)
        self._stall_timer = self.loop.call_later(self.stalled_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        self._cancel(self._stall_timer)
        self._stall_timer = None
        super().resume_writing()

    def _expect_head(self) -> None:
        self._cancel(self._head_timer)
        self._head_timer = self.loop.call_later(
            self.head_seconds, self.refuse, HttpError(408, "the request's headers did not come in time")
        )

    @staticmethod
    def _cancel(*timers: TimerHandle | None) -> None:
        for timer in timers:
            if timer is not None:
                timer.cancel()
