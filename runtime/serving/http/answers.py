"""Answers of the engine as OpenAI's objects: whole, or as a stream of server-sent events."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from optc.runtime.serving.client import Channel, Pending
from optc.runtime.serving.counters import TOTAL, TPOT, TTFT
from optc.runtime.serving.http.asking import ClientLeftError, asking, news
from optc.runtime.serving.http.errors import HttpError
from optc.runtime.serving.http.jobs import Job
from optc.runtime.serving.http.logprobs import chat_logprobs, completion_logprobs
from optc.runtime.serving.request import TokenLogprobs
from optc.runtime.serving.text import AnswerText
from optc.runtime.serving.tool_calls import ToolCall, ToolText

_encode = msgspec.json.Encoder().encode
_FINISH = {"stop": "stop", "length": "length", "context": "length", "cancelled": "stop"}


@dataclass
class Piece:
    """What one choice got: text, calls of tools, (token, its log-probabilities) of each token, why it ended."""

    index: int
    text: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[tuple[int, TokenLogprobs]] = field(default_factory=list)
    finish: str | None = None


class Choice:
    """One answer while it comes."""

    def __init__(self, job: Job, index: int) -> None:
        self._job, self._index = job, index
        self._text = AnswerText(job.state.text.tokenizer, job.hidden, job.stops)
        self._tools = ToolText() if job.tools else None
        self._first: float | None = None
        self.tokens = 0
        self.calls = 0
        self.length = 0  # characters of its text so far
        self.done = False

    def take(self, new: Pending) -> Piece:
        """The next piece; afterwards `done` says whether it was the last.

        Raises:
            HttpError: 500, the engine could not go on with this request.
        """
        if new.finish == "error":
            raise HttpError(500, new.error or "the engine failed", code="engine_error")
        piece = Piece(self._index)
        piece.text, used = self._text.push(new.tokens, last=new.finish is not None)
        piece.logprobs = list(zip(new.tokens[:used], new.logprobs, strict=False))
        self.tokens += used
        stopped = self._text.stop is not None
        if stopped or new.finish is not None:
            piece.finish = "stop" if stopped else _FINISH[str(new.finish)]
            self.done = True
        if self._tools is not None:
            piece.text, piece.calls = self._tools.push(piece.text, last=self.done)
            self.calls += len(piece.calls)
            if self.calls and piece.finish == "stop":
                piece.finish = "tool_calls"
        self._measure(used)
        return piece

    def _measure(self, used: int) -> None:
        now, counters = time.perf_counter(), self._job.state.counters
        if self._first is None and used:
            self._first = now
            counters.observe(TTFT, now - self._job.arrived)
        if self.done:
            counters.observe(TOTAL, now - self._job.arrived)
            if self._first is not None and self.tokens > 1:
                counters.observe(TPOT, (now - self._first) / (self.tokens - 1))


class Answering:
    """The choices of a job, and what they add up to."""

    def __init__(self, job: Job, channel: Channel) -> None:
        self._channel = channel
        self.choices = [Choice(job, index) for index in range(len(job.requests))]
        self._prompt_tokens = job.prompt_tokens
        self._cached: dict[int, int] = {}

    async def pieces(self) -> list[Piece]:
        """What came since the last call; waits for something.

        Raises:
            HttpError: the request ends with an error.
            ClientLeftError: it ends with nobody there.
        """
        found = []
        for index, new in (await news(self._channel)).items():
            choice = self.choices[index]
            if choice.done:
                continue
            if new.cached_tokens is not None:
                self._cached[index] = new.cached_tokens
            piece = choice.take(new)
            found.append(piece)
            if piece.finish is not None:
                self._channel.cancel(index)  # where a stop string ended it, the engine does not know
        return found

    @property
    def done(self) -> bool:
        return all(choice.done for choice in self.choices)

    def usage(self) -> dict[str, Any]:
        """Tokens, as OpenAI counts them: a prompt once, whatever n is; a stop token counts."""
        new = sum(choice.tokens for choice in self.choices)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": new,
            "total_tokens": self._prompt_tokens + new,
            "prompt_tokens_details": {"cached_tokens": min(self._prompt_tokens, sum(self._cached.values()))},
        }


class JobResponse(Response):
    """Runs a job and sends its answer. An error before the first piece is an answer of its own status."""

    def __init__(self, job: Job) -> None:
        self._job, self.background = job, None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with asking(self._job.state, self._job.requests, receive) as channel:
            answering = Answering(self._job, channel)
            if self._job.stream:
                await self._stream(answering, send)
            else:
                await self._whole(answering, scope, receive, send)

    async def _whole(self, answering: Answering, scope: Scope, receive: Receive, send: Send) -> None:
        parts: list[list[Piece]] = [[] for _ in answering.choices]
        while not answering.done:
            for piece in await answering.pieces():
                parts[piece.index].append(piece)
        choices = [self._choice(index, pieces) for index, pieces in enumerate(parts)]
        kind = "chat.completion" if self._job.chat else "text_completion"
        body = {**self._head(kind), "choices": choices, "usage": answering.usage()}
        await Response(_encode(body), media_type="application/json")(scope, receive, send)

    def _choice(self, index: int, pieces: list[Piece]) -> dict[str, Any]:
        text = "".join(piece.text for piece in pieces)
        calls = [_call(call) for piece in pieces for call in piece.calls]
        found: dict[str, Any] = {"index": index}
        if self._job.chat:
            found["message"] = {"role": "assistant", "content": text or (None if calls else ""), "refusal": None}
            if calls:
                found["message"]["tool_calls"] = calls
        else:
            found["text"] = text
        rows = [row for piece in pieces for row in piece.logprobs]
        return {**found, "logprobs": self._logprobs(rows, 0), "finish_reason": pieces[-1].finish}

    async def _stream(self, answering: Answering, send: Send) -> None:
        pieces = await answering.pieces()
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        kind = "chat.completion.chunk" if self._job.chat else "text_completion"
        head = self._head(kind)
        events = [
            {"index": choice, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
            for choice in range(len(answering.choices) if self._job.chat else 0)
        ]
        try:
            while True:
                events += [item for piece in pieces if (item := self._event(piece, answering)) is not None]
                if events:
                    usage = self._running_usage(answering)
                    await send(_body(*({**head, "choices": [event], **usage} for event in events)))
                if answering.done:
                    break
                events, pieces = [], await answering.pieces()
        except ClientLeftError:
            return
        except HttpError as error:
            await send(_event_body(error.body()))
            return
        if self._job.usage.include_usage:
            await send(_body({**head, "choices": [], "usage": answering.usage()}))
        await send(_event_body(b"[DONE]"))

    def _running_usage(self, answering: Answering) -> dict[str, Any]:
        if not self._job.usage.include_usage:
            return {}
        return {"usage": answering.usage() if self._job.usage.continuous_usage_stats else None}

    def _event(self, piece: Piece, answering: Answering) -> dict[str, Any] | None:
        if not (piece.text or piece.calls or piece.logprobs or piece.finish):
            return None
        choice = answering.choices[piece.index]
        found: dict[str, Any] = {"index": piece.index}
        if self._job.chat:
            delta: dict[str, Any] = {"content": piece.text} if piece.text else {}
            if piece.calls:
                first = choice.calls - len(piece.calls)
                delta["tool_calls"] = [{"index": first + i, **_call(call)} for i, call in enumerate(piece.calls)]
            found["delta"] = delta
        else:
            found["text"] = piece.text
        found |= {"logprobs": self._logprobs(piece.logprobs, choice.length), "finish_reason": piece.finish}
        choice.length += len(piece.text)
        return found

    def _logprobs(self, rows: list[tuple[int, TokenLogprobs]], offset: int) -> dict[str, Any] | None:
        if self._job.logprobs is None:
            return None
        tokenizer = self._job.state.text.tokenizer
        return chat_logprobs(tokenizer, rows) if self._job.chat else completion_logprobs(tokenizer, rows, offset)

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._job.id, "object": kind, "created": self._job.created, "model": self._job.state.config.name}


def _call(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}


def _body(*events: dict[str, Any]) -> Message:
    data = b"".join(b"data: " + _encode(event) + b"\n\n" for event in events)
    return {"type": "http.response.body", "body": data, "more_body": True}


def _event_body(data: bytes) -> Message:
    """The last event."""
    return {"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": False}
