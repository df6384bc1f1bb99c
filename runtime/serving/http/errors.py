"""Refusals, in the form that OpenAI's clients read: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import msgspec
from starlette.responses import Response

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class HttpError(Exception):
    """An answer that is an error.

    Attributes:
        message: a sentence for the user of the client.
        param: the field of the body that is at fault.
        code: a word for programs.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, close: bool = False
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.close = status, message, param, code, close

    def body(self) -> bytes:
        """The error as JSON."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})

    def response(self) -> Response:
        """The error as an answer; where the engine may be back soon, it says when to ask again."""
        headers = {"retry-after": "1"} if self.status in (429, 503) else {}
        headers |= {"www-authenticate": "Bearer"} if self.status == 401 else {}
        headers |= {"connection": "close"} if self.close else {}
        return Response(self.body(), self.status, headers, media_type="application/json")


def no_engine() -> HttpError:
    """The engine is not there: it starts, or has died."""
    return HttpError(503, "the engine is not running; it is being started", code="engine_unavailable")


def engine_lost() -> HttpError:
    """The engine died with the request in it."""
    return HttpError(503, "the engine ended while it ran this request; send it again", code="engine_lost")


def stopping() -> HttpError:
    """The server ends."""
    return HttpError(503, "the server is shutting down", code="shutting_down", close=True)


def timed_out(seconds: float) -> HttpError:
    """The request took longer than any may."""
    return HttpError(504, f"the request took longer than {seconds:g} seconds", code="timeout")
