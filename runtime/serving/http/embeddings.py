"""/v1/embeddings: texts or token ids to vectors, in OpenAI's form."""

from __future__ import annotations

import base64
import time
from typing import Any

import msgspec
import numpy as np
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from optc.compiler.diagnostics import UsageError
from optc.runtime.serving.counters import TOTAL
from optc.runtime.serving.http.asking import asking, news
from optc.runtime.serving.http.bodies import EmbeddingBody
from optc.runtime.serving.http.errors import HttpError
from optc.runtime.serving.http.jobs import check_model, too_long
from optc.runtime.serving.http.state import ServerState
from optc.runtime.serving.request import Embed
from optc.runtime.sessions.embedding_model import prompt_of

MOST_INPUTS = 2048
"""Texts of one request, as OpenAI's."""


def embedding_described(state: ServerState) -> dict[str, Any]:
    """What /v1/models says of a model's embeddings; nothing where it has none."""
    facts = state.text.embedding
    if facts is None:
        return {}
    return {
        "embedding_size": facts.size,
        "normalized": facts.normalized,
        "prompt_names": sorted(facts.prompts),
        "default_prompt_name": facts.default_prompt,
    }


async def embedding_response(state: ServerState, body: EmbeddingBody) -> Response:
    """The answer to a body.

    Raises:
        HttpError: 400, what does not fit the model; 404, another model, or one that generates; 503, no engine.
    """
    arrived = time.perf_counter()
    check_model(state, body.model, "embed")
    size = state.info.embedding_size
    if body.dimensions not in (None, size):
        message = f"'dimensions' can only be {size}: nothing says that the model was trained for shorter embeddings"
        raise HttpError(400, message, param="dimensions", code="unsupported_parameter")
    rows = await _rows(state, body)
    most = min(state.options.max_prompt_tokens or state.info.context_length, state.info.context_length)
    longest = max(map(len, rows))
    if longest > most:
        raise too_long(longest, most)
    if not all(rows):
        raise HttpError(400, "an input is empty", param="input")
    return _EmbeddingResponse(state, rows, body.encoding_format, arrived)


async def _rows(state: ServerState, body: EmbeddingBody) -> list[list[int]]:
    """Token ids of each input. Texts get a prompt and special tokens; token ids are taken as they are."""
    given: Any = [body.input] if isinstance(body.input, str) else body.input
    kinds = {type(item) for item in given}
    if len(kinds) != 1:
        raise HttpError(400, "'input' mixes texts and tokens" if kinds else "'input' is empty", param="input")
    if kinds == {int}:
        given = [given]
    if len(given) > MOST_INPUTS:
        raise HttpError(400, f"{len(given)} inputs are given; at most {MOST_INPUTS} may be", param="input")
    if kinds != {str}:
        if body.prompt_name is not None:
            message = "'prompt_name' has no effect on token ids, which are taken as they are"
            raise HttpError(400, message, param="prompt_name", code="unsupported_parameter")
        rows: list[list[int]] = given
        return rows
    assert state.text.embedding is not None, "a model that gives embeddings"
    try:
        prompt = prompt_of(state.text.embedding, body.prompt_name)
    except UsageError as error:
        raise HttpError(400, f"{error.what}: {error.why or error.remedy}", param="prompt_name") from error
    return await state.encode_all([prompt + text for text in given], special=True)


class _EmbeddingResponse(Response):
    """Asks the engine and sends the vectors."""

    def __init__(self, state: ServerState, rows: list[list[int]], form: str, arrived: float) -> None:
        self._state, self._rows, self._form, self._arrived = state, rows, form, arrived
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Embed(id=self._state.client.new_id(), rows=self._rows)
        found, finish = bytearray(), None
        async with asking(self._state, [request], receive) as channel:
            while finish is None:
                new = (await news(channel))[0]
                found += new.embeddings
                finish = new.finish
        if finish != "stop":
            raise HttpError(500, new.error or "the engine failed", code="engine_error")
        self._state.counters.observe(TOTAL, time.perf_counter() - self._arrived)
        data = msgspec.json.encode(self._body(bytes(found)))
        await Response(data, media_type="application/json")(scope, receive, send)

    def _body(self, found: bytes) -> dict[str, Any]:
        size = len(found) // len(self._rows)
        vectors: list[Any]
        if self._form == "base64":
            pieces = (found[start : start + size] for start in range(0, len(found), size))
            vectors = [base64.b64encode(piece).decode() for piece in pieces]
        else:
            vectors = np.frombuffer(found, np.float32).reshape(len(self._rows), -1).tolist()
        tokens = sum(map(len, self._rows))
        return {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": vector} for index, vector in enumerate(vectors)
            ],
            "model": self._state.config.name,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }
