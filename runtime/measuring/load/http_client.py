"""A small HTTP/1.1 client for streamed completions and for embeddings: one request at a time on a connection that is kept."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult, urlsplit

import msgspec
from msgspec import Struct

from optc.compiler.diagnostics import JSON_ERRORS, InputError

_LINE = 1 << 20


class _Usage(Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Delta(Struct):
    content: str | None = None


class _Choice(Struct):
    text: str | None = None
    delta: _Delta | None = None


class _Embeddings(Struct):
    usage: _Usage
    data: list[msgspec.Raw]


class _Event(Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Event).decode
_decode_embeddings = msgspec.json.Decoder(_Embeddings).decode


@dataclass
class Timing:
    """One request, in seconds of `time.perf_counter`.

    Attributes:
        due: when it was to be sent; latencies are counted from there, so that a late client does not hide a slow server.
        first, last: of the pieces of its text; of embeddings, both are when they were there.
        gaps: between pieces. A server may put several tokens into one.
        tokens: of the answer, as the server counts them.
        error: "" where it was answered whole.
    """

    due: float
    first: float = 0.0
    last: float = 0.0
    gaps: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    tokens: int = 0
    error: str = ""

    @property
    def ttft(self) -> float:
        return self.first - self.due

    @property
    def total(self) -> float:
        return self.last - self.due

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first one; None where there was one only."""
        return (self.last - self.first) / (self.tokens - 1) if self.tokens > 1 else None


class Client:
    """A connection to a server, opened when it is used.

    Args:
        url: of the server, with or without /v1.

    Raises:
        InputError: not an address of HTTP.
    """

    def __init__(self, url: str, key: str = "") -> None:
        self._url = _split(url)
        self._base = self._url.path.rstrip("/").removesuffix("/v1") + "/v1"
        self._key = key
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def get(self, path: str) -> Any:
        """A JSON answer.

        Raises:
            InputError: the server cannot be reached, or refuses.
        """
        try:
            status, reader, length = await self._ask("GET", path, b"")
            body = b"".join([piece async for piece in _body(reader, length)])
        except (OSError, EOFError, ValueError) as error:
            raise InputError(
                "the server cannot be reached",
                where=self._url.geturl(),
                why=str(error),
                remedy="start it, or correct the address",
            ) from error
        if status != 200:
            raise InputError(
                f"the server answers {status}",
                where=self._base + path,
                why=body[:300].decode("latin-1"),
                remedy="look into the log of the server",
            )
        try:
            return msgspec.json.decode(body)
        except JSON_ERRORS as error:
            raise InputError(
                "the server's answer is not JSON",
                where=self._base + path,
                why=str(error),
                remedy="give the address of a server with the API of OpenAI",
            ) from error

    async def complete(self, body: bytes, due: float) -> Timing:
        """Send a completion with "stream" and read it to its end; a failure is in `Timing.error`."""
        found = Timing(due)
        try:
            status, reader, length = await self._ask("POST", "/completions", body)
            if status != 200:
                text = b"".join([piece async for piece in _body(reader, length)])
                found.error = f"{status}: {text[:300].decode('utf-8', 'replace')}"
                return found
            held = b""
            async for piece in _body(reader, length):
                held += piece
                *events, held = held.split(b"\n\n")
                _note(found, events)
        except (OSError, EOFError, *JSON_ERRORS) as error:
            self.close()
            found.error = f"{type(error).__name__}: {error}"
        if not found.error and not found.first:
            found.error = "an answer without text"
        return found

    async def embed(self, body: bytes, due: float) -> Timing:
        """Send a request for the embedding of one text and read its answer; a failure is in `Timing.error`."""
        found = Timing(due)
        try:
            status, reader, length = await self._ask("POST", "/embeddings", body)
            answer = b"".join([piece async for piece in _body(reader, length)])
            found.first = found.last = time.perf_counter()
            if status != 200:
                found.error = f"{status}: {answer[:300].decode('utf-8', 'replace')}"
                return found
            read = _decode_embeddings(answer)
            found.prompt_tokens = read.usage.prompt_tokens
            found.error = "" if len(read.data) == 1 else f"{len(read.data)} embeddings of one text"
        except (OSError, EOFError, *JSON_ERRORS) as error:
            self.close()
            found.error = f"{type(error).__name__}: {error}"
        return found

    async def _ask(self, method: str, path: str, body: bytes) -> tuple[int, asyncio.StreamReader, int | None]:
        """(status, where the body comes, its length or None where it is chunked)."""
        reader, writer = self._streams or await self._open()
        key = f"authorization: Bearer {self._key}\r\n" if self._key else ""
        host = self._url.netloc.rpartition("@")[2]
        head = f"{method} {self._base}{path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n{key}"
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        status = int((await reader.readuntil(b"\r\n")).split()[1])
        length: int | None = 0
        while (line := await reader.readuntil(b"\r\n")) != b"\r\n":
            name, _, value = line.decode("latin-1").partition(":")
            name, value = name.lower(), value.strip().lower()
            if name == "content-length":
                length = int(value)
            elif name == "transfer-encoding" and "chunked" in value:
                length = None
            elif name == "connection" and "close" in value:
                self._streams = None
        return status, reader, length

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        secure = self._url.scheme == "https"
        port = self._url.port or (443 if secure else 80)
        context = ssl.create_default_context() if secure else None
        self._streams = await asyncio.open_connection(self._url.hostname, port, ssl=context, limit=_LINE)
        return self._streams

    def close(self) -> None:
        """Let the connection go."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


def _note(found: Timing, events: list[bytes]) -> None:
    """What events of a stream say, all of them having come now."""
    now = time.perf_counter()
    text = False
    for event in events:
        data = event.strip().removeprefix(b"data:").strip()
        if not data or data == b"[DONE]" or not event.lstrip().startswith(b"data:"):
            continue
        read = _decode(data)
        if read.error is not None:
            found.error = f"{read.error}"[:300]
        if read.usage is not None:
            found.prompt_tokens, found.tokens = read.usage.prompt_tokens, read.usage.completion_tokens
        text = text or any(item.text or (item.delta and item.delta.content) for item in read.choices)
    if text:
        if found.first:
            found.gaps.append(now - found.last)
        else:
            found.first = now
        found.last = now


async def _body(reader: asyncio.StreamReader, length: int | None) -> AsyncIterator[bytes]:
    if length is not None:
        yield await reader.readexactly(length)
        return
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)
    await reader.readuntil(b"\r\n")


def _split(url: str) -> SplitResult:
    try:
        found = urlsplit(url)
        port = found.port
    except ValueError as error:
        raise InputError(
            "not an address of a server", where=url, why=str(error), remedy="give a URL such as http://127.0.0.1:8000"
        ) from error
    if found.scheme not in ("http", "https") or not found.hostname or port == 0 or any(c in url for c in "\r\n "):
        raise InputError("not an address of a server", where=url, remedy="give http://HOST:PORT")
    return found
