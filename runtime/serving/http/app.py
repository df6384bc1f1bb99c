"""The server's paths, and what stands before all of them: keys, hosts, sizes."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import re
import time
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from optc.runtime.serving.http.answers import JobResponse
from optc.runtime.serving.http.asking import ClientLeftError
from optc.runtime.serving.http.bodies import (
    BodyT,
    ChatBody,
    CompletionBody,
    DetokenizeBody,
    EmbeddingBody,
    TokenizeBody,
    read_json,
)
from optc.runtime.serving.http.embeddings import embedding_described, embedding_response
from optc.runtime.serving.http.errors import HttpError
from optc.runtime.serving.http.jobs import chat_job, completion_job
from optc.runtime.serving.http.page import page_response
from optc.runtime.serving.http.state import ServerState

_BODY_SECONDS = 30.0  # until a body is there
_OPEN_BODIES = 32  # of the largest size, that may be held at once
_LINGER_BYTES, _LINGER_SECONDS = 64 << 20, 2.0  # of a body that is refused, read away so that the answer is seen
_OPEN_PATHS = ("/", "/health")


def build_app(state: ServerState) -> ASGIApp:
    """The ASGI application of one process."""
    routes = [
        Route("/", _page, methods=["GET"]),
        Route("/health", _health, methods=["GET"]),
        Route("/metrics", _metrics, methods=["GET"]),
        Route("/v1/models", _models, methods=["GET"]),
        Route("/v1/models/{name}", _model, methods=["GET"]),
        Route("/v1/completions", _completions, methods=["POST"]),
        Route("/v1/chat/completions", _chat, methods=["POST"]),
        Route("/v1/embeddings", _embeddings, methods=["POST"]),
        Route("/tokenize", _tokenize, methods=["POST"]),
        Route("/detokenize", _detokenize, methods=["POST"]),
    ]
    handlers: dict[Any, Any] = {
        HttpError: lambda _, error: error.response(),
        HTTPException: _starlette_error,
        ClientLeftError: lambda _, error: Response(status_code=499),
        ClientDisconnect: lambda _, error: Response(status_code=499),
        Exception: lambda _, error: HttpError(500, "a fault of the server; its log has the particulars").response(),
    }
    middleware = []
    if state.options.cors_origin:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(state.options.cors_origin),
                allow_methods=["GET", "POST"],
                allow_headers=["authorization", "content-type"],
            )
        )
    middleware.append(Middleware(_Gate, state=state))
    app = Starlette(routes=routes, exception_handlers=handlers, middleware=middleware)
    app.router.redirect_slashes = False
    app.state.server = state
    return _Counted(app, state)


class _Counted:
    """Counts answers by status."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app, self._state = app, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._state.counters.count_status(message["status"])
            await send(message)

        await self._app(scope, receive, counted)


class _Gate:
    """Refuses what must not reach the paths.

    A page of another site can send a simple POST to a server on this machine, or make its own name point here (DNS
    rebinding). The first has no JSON content type, and the second another host than this machine's.
    """

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app = app
        self._keys = [hashlib.sha256(key.encode()).digest() for key in state.config.api_keys]
        self._local = _is_loopback(state.options.host)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._refusal(scope)
        if error is not None:
            await error.response()(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> HttpError | None:
        headers = dict(scope["headers"])
        if self._local and not _is_loopback(_host(headers.get(b"host", b"").decode("latin-1"))):
            return HttpError(403, "this server listens on this machine only, and was called by another name")
        if self._keys and scope["path"] not in _OPEN_PATHS and not self._known(headers.get(b"authorization", b"")):
            return HttpError(401, "give an API key: Authorization: Bearer KEY", code="invalid_api_key")
        if scope["method"] == "POST":
            kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
            if kind != b"application/json":
                return HttpError(415, "the content type must be application/json", code="unsupported_media_type")
        return None

    def _known(self, header: bytes) -> bool:
        scheme, _, key = header.partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        matches = [hmac.compare_digest(digest, item) for item in self._keys]  # all of them, in constant time
        return scheme.lower() == b"bearer" and any(matches)


def _host(header: str) -> str:
    """The name or address of a Host header, without its port."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.rpartition(":")[0] if re.search(r":\d+$", header) else header


def _is_loopback(host: str) -> bool:
    if host in ("", "localhost") or host.endswith(".localhost"):  # HTTP/1.0 needs no Host
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _state(request: Request) -> ServerState:
    state: ServerState = request.app.state.server
    return state


async def _read(request: Request, kind: type[BodyT]) -> BodyT:
    """The body, within its limits.

    Raises:
        HttpError: 413, 408, 503 while too much of others' bodies is held, or as `read_json`.
    """
    state = _state(request)
    most = state.options.max_body_bytes
    length = request.headers.get("content-length", "")
    data = bytearray()
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            if not (length.isdigit() and int(length) > most):
                async for chunk in request.stream():
                    data += chunk
                    state.body_bytes += len(chunk)
                    if len(data) > most:
                        break
                    if state.body_bytes > _OPEN_BODIES * most:
                        raise HttpError(503, "too many bodies are being read", code="too_many_bodies", close=True)
                else:
                    return read_json(bytes(data), kind)
    except TimeoutError:
        raise HttpError(408, "the body did not come in time", close=True) from None
    finally:
        state.body_bytes -= len(data)
    await _read_away(request)
    raise HttpError(413, f"the body has more than {most} bytes", code="body_too_large", close=True)


async def _read_away(request: Request) -> None:
    """A client that is still sending does not see an answer on a connection that is closed under it."""
    seen = 0
    try:
        async with asyncio.timeout(_LINGER_SECONDS):
            while seen < _LINGER_BYTES:
                message = await request.receive()
                if message["type"] != "http.request" or not message.get("more_body"):
                    return
                seen += len(message["body"])
    except TimeoutError:
        return


def _json(found: Any) -> Response:
    return Response(msgspec.json.encode(found), media_type="application/json")


def _starlette_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        response = HttpError(405, f"{request.method} is not for this path; {allowed} is").response()
        response.headers["allow"] = allowed
        return response
    if error.status_code == 404:
        return HttpError(404, "there is no such path", code="unknown_url").response()
    return HttpError(error.status_code, str(error.detail)).response()


async def _completions(request: Request) -> Response:
    return JobResponse(await completion_job(_state(request), await _read(request, CompletionBody)))


async def _chat(request: Request) -> Response:
    return JobResponse(await chat_job(_state(request), await _read(request, ChatBody)))


async def _embeddings(request: Request) -> Response:
    return await embedding_response(_state(request), await _read(request, EmbeddingBody))


async def _tokenize(request: Request) -> Response:
    state, body = _state(request), await _read(request, TokenizeBody)
    context = state.info.context_length
    if (body.prompt is None) == (body.messages is None):
        raise HttpError(400, "give either 'prompt' or 'messages'", param="prompt")
    if body.messages is not None:
        tokens = await state.chat_prompt([message.plain() for message in body.messages])
    else:
        tokens = await state.encode(body.prompt or "", special=body.add_special_tokens)
    return _json({"tokens": tokens, "count": len(tokens), "max_model_len": context})


async def _detokenize(request: Request) -> Response:
    state, body = _state(request), await _read(request, DetokenizeBody)
    beyond = next((token for token in body.tokens if token >= state.info.vocab_size), None)
    if beyond is not None:
        raise HttpError(400, f"token {beyond} is outside the vocabulary of {state.info.vocab_size}", param="tokens")
    return _json({"prompt": state.text.tokenizer.decode(body.tokens)})


def _described(state: ServerState) -> dict[str, Any]:
    info = state.info
    return {
        "id": state.config.name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "optc",
        "max_model_len": info.context_length,
        "vocab_size": info.vocab_size,
        "serves": info.serves,
        "max_running": info.max_running,
        "device": info.device,
        "task": info.task,
        "chat": info.task == "generate" and state.text.template is not None,
    } | embedding_described(state)


async def _models(request: Request) -> Response:
    return _json({"object": "list", "data": [_described(_state(request))]})


async def _model(request: Request) -> Response:
    found = _described(_state(request))
    if request.path_params["name"] != found["id"]:
        raise HttpError(404, f"this server has {found['id']!r}", code="model_not_found")
    return _json(found)


async def _health(request: Request) -> Response:
    _state(request).info  # noqa: B018 - raises where there is no engine
    return _json({"status": "ok"})


async def _metrics(request: Request) -> Response:
    state = _state(request)
    text = state.counters.text(state.client.info, state.client.metrics)
    return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


async def _page(request: Request) -> Response:
    return page_response()
