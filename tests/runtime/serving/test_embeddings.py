"""Embeddings served: turns of the engine, and /v1/embeddings as the real openai package asks for it, without a network."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import socket
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import numpy as np
import openai
import pytest
from openai import AsyncOpenAI
from sentence_folders import TEXTS, embedding_artifact
from serving import Got, take

import optc
from optc.compiler.diagnostics import BusyError, InputError, UsageError
from optc.runtime.serving.counters import Counters
from optc.runtime.serving.embedding_engine import NOT_FINITE, EmbeddingEngine, open_embedding_engine
from optc.runtime.serving.engine_options import EngineOptions
from optc.runtime.serving.engine_process import EngineServer, open_artifact
from optc.runtime.serving.http.app import build_app
from optc.runtime.serving.http.state import ServerState
from optc.runtime.serving.request import Embed, Generate
from optc.runtime.serving.settings import ServeOptions, ServerConfig
from optc.runtime.serving.wire import Frames, Refused, decode_from_engine, frame
from optc.runtime.sessions.embedding_model import EmbeddingModel


@pytest.fixture(scope="module")
def model() -> EmbeddingModel:
    found: EmbeddingModel = optc.load(embedding_artifact())
    return found


def engine_of(**options: Any) -> EmbeddingEngine:
    return open_embedding_engine(embedding_artifact(), EngineOptions(**options))


def vectors(got: Got) -> np.ndarray[Any, np.dtype[np.float32]]:
    found = b"".join(answer.embeddings for answer in got.answers)
    return np.frombuffer(found, np.float32).reshape(-1, 24)


# -- the engine ------------------------------------------------------------------------------------


def test_rows_of_all_requests_take_turns(model: EmbeddingModel) -> None:
    """A step has at most 20 tokens with padding, and a long request does not hold up a short one."""
    engine = engine_of(max_running=4, token_budget=20)
    assert (engine.info.task, engine.info.serves, engine.info.embedding_size) == ("embed", "rows", 24)
    many, one = [[2, 5, 3], [2, 6, 7, 8, 3], [2, 9, 3], [2, 10, 11, 3], [2, 12, 3]], [[2, 13, 3]]
    engine.submit(Embed(id="many", rows=many))
    engine.submit(Embed(id="one", rows=one))
    assert (engine.metrics().waiting, engine.metrics().running, engine.idle) == (2, 0, False)
    got: dict[str, Got] = {}
    steps = []
    while not engine.idle:
        answers = engine.step()
        steps.append({answer.id: len(answer.embeddings) // 96 for answer in answers})
        take(got, answers)
    assert steps == [{"many": 3, "one": 1}, {"many": 2}]  # many, one, many, many: 4 rows of 5; then the rest
    for name, rows in (("many", many), ("one", one)):
        np.testing.assert_allclose(vectors(got[name]), model.embed_tokens(rows), atol=1e-6)
        assert got[name].finish == "stop"
    metrics = engine.metrics()
    assert (metrics.steps, metrics.prompt_tokens, metrics.finished) == (2, 21, {"stop": 2})


def test_the_budget_bounds_a_step() -> None:
    """A row that does not fit is the first of the next step; one beyond the budget runs alone."""
    engine = engine_of(max_running=8, token_budget=9)
    engine.submit(Embed(id="a", rows=[[2, 3], [2] * 12, [2, 3], [2, 3], [2, 3, 4]]))
    sizes = []
    while not engine.idle:
        sizes += [len(answer.embeddings) // 96 for answer in engine.step()]
    assert sizes == [1, 1, 3]


def test_requests_end_early_or_are_refused(model: EmbeddingModel, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_of(max_running=1, max_waiting=2, token_budget=4)
    engine.submit(Embed(id="a", rows=[[5], [6]]))
    engine.submit(Embed(id="b", rows=[[7]]))
    with pytest.raises(BusyError):
        engine.submit(Embed(id="c", rows=[[5]]))
    with pytest.raises(InputError, match="has not ended"):
        engine.submit(Embed(id="a", rows=[[5]]))
    engine.step()
    engine.cancel("a")
    engine.cancel("nobody")
    answers = engine.step()
    assert [(answer.id, answer.finish) for answer in answers] == [("a", "cancelled"), ("b", "stop")]
    assert engine.idle
    for rows in ([], [[]], [[5], []], [[999]], [[-1]], [[5] * 17]):
        with pytest.raises(InputError):
            engine.submit(Embed(id="d", rows=rows))
    own = EmbeddingModel.embed_batch

    def overflows(self: EmbeddingModel, rows: list[list[int]]) -> Any:
        return np.where(np.array([[row[0] == 6] for row in rows]), np.inf, own(self, rows))

    monkeypatch.setattr(EmbeddingModel, "embed_batch", overflows)
    engine.submit(Embed(id="bad", rows=[[6], [5]]))
    engine.submit(Embed(id="good", rows=[[5]]))
    got: dict[str, Got] = {}
    while not engine.idle:
        take(got, engine.step())
    assert (got["bad"].finish, got["bad"].answers[-1].error) == ("error", NOT_FINITE)
    assert got["good"].finish == "stop"
    for name in ("num_blocks", "speculation"):
        with pytest.raises(UsageError, match="no effect on a model that gives embeddings"):
            engine_of(**{name: 3})


# -- over HTTP -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The socket of an engine's server, which runs in a thread."""
    place = tmp_path_factory.mktemp("s")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(place / "engine"))
    listener.listen()
    server = EngineServer(open_artifact(embedding_artifact(), ServeOptions(max_running=4, token_budget=32)), listener)
    ended = threading.Event()

    def run() -> None:
        while not ended.is_set():
            server.turn()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    yield place / "engine"
    ended.set()
    with socket.socket(socket.AF_UNIX) as wakes:
        wakes.connect(str(place / "engine"))
    thread.join(10)
    listener.close()


@contextlib.asynccontextmanager
async def connected(engine_path: Path, **options: Any) -> AsyncIterator[tuple[AsyncOpenAI, httpx.AsyncClient]]:
    """The application of an API process, asked without a network."""
    counters = engine_path.parent / "counters"
    Counters.create(counters, 1)
    config = ServerConfig(
        folder=embedding_artifact(), name="m", opener="", options=ServeOptions(**options),
        engine_socket=str(engine_path), counters=str(counters),
    )  # fmt: skip
    state = ServerState(config)
    task = asyncio.create_task(state.client.run())
    await state.opened.wait()
    transport = httpx.ASGITransport(app=build_app(state))  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as plain:
        yield AsyncOpenAI(base_url="http://localhost/v1", api_key="none", max_retries=0, http_client=plain), plain
    task.cancel()


Asked = Callable[[AsyncOpenAI, httpx.AsyncClient], Coroutine[Any, Any, None]]


def ask(engine_path: Path, body: Asked, **options: Any) -> None:
    async def run() -> None:
        async with connected(engine_path, **options) as (client, plain):
            await body(client, plain)

    asyncio.run(run())


def test_what_the_openai_package_gets(engine_path: Path, model: EmbeddingModel) -> None:
    wanted = model.embed(TEXTS[:2], prompt_name="document")

    async def body(client: AsyncOpenAI, plain: httpx.AsyncClient) -> None:
        extra = {"prompt_name": "document"}
        found = await client.embeddings.create(model="m", input=TEXTS[:2], extra_body=extra)  # base64 on the wire
        np.testing.assert_allclose([row.embedding for row in found.data], wanted, atol=1e-6)
        rows = model.tokens(TEXTS[:2], prompt_name="document")
        count = sum(map(len, rows))
        assert (found.usage.prompt_tokens, found.usage.total_tokens, found.model) == (count, count, "m")
        assert [(row.object, row.index) for row in found.data] == [("embedding", 0), ("embedding", 1)]
        floats = await client.embeddings.create(model="m", input=rows, encoding_format="float", dimensions=24)
        np.testing.assert_allclose([row.embedding for row in floats.data], wanted, atol=1e-6)
        one = await client.embeddings.create(model="m", input=rows[1])
        np.testing.assert_allclose(one.data[0].embedding, wanted[1], atol=1e-6)
        query = await client.embeddings.create(model="m", input="a boat", user="u")  # the default prompt
        np.testing.assert_allclose(query.data[0].embedding, model.embed("a boat"), atol=1e-6)
        raw = await plain.post("/v1/embeddings", json={"input": "a boat", "encoding_format": "base64"})
        vector = np.frombuffer(base64.b64decode(raw.json()["data"][0]["embedding"]), np.float32)
        np.testing.assert_allclose(vector, model.embed("a boat"), atol=1e-6)
        known = (await client.models.list()).data[0].model_extra
        assert known is not None
        assert {name: known[name] for name in ("task", "chat", "serves", "embedding_size", "prompt_names")} == {
            "task": "embed", "chat": False, "serves": "rows", "embedding_size": 24, "prompt_names": ["document", "query"],
        }  # fmt: skip
        tokens = (await plain.post("/tokenize", json={"prompt": "The boat"})).json()
        assert tokens["tokens"] == model.tokens(["the boat"], prompt_name="document")[0]

    ask(engine_path, body)


def test_many_at_once(engine_path: Path, model: EmbeddingModel) -> None:
    """40 clients, each with its own texts of several lengths: each gets what it gets alone."""
    texts = [[" ".join(["sea"] * (1 + (client * 7 + row) % 9)) for row in range(3)] for client in range(40)]

    async def body(client: AsyncOpenAI, plain: httpx.AsyncClient) -> None:
        found = await asyncio.gather(*(client.embeddings.create(model="m", input=item) for item in texts))
        for item, answer in zip(texts, found, strict=True):
            np.testing.assert_allclose([row.embedding for row in answer.data], model.embed(item), atol=1e-6)

    ask(engine_path, body)


def test_refusals_have_openais_form(engine_path: Path) -> None:
    cases: list[tuple[dict[str, Any], int, str | None, str | None]] = [
        ({"input": []}, 400, "input", None),
        ({"input": ["a", 3]}, 400, "input", None),
        ({"input": [[3], "a"]}, 400, "input", None),
        ({"input": [[]]}, 400, "input", None),
        ({"input": [["a"]]}, 400, "input", "invalid_parameter"),
        ({"input": {"a": 1}}, 400, "input", "invalid_parameter"),
        ({}, 400, "input", "missing_parameter"),
        ({"input": "a", "dimensions": 12}, 400, "dimensions", "unsupported_parameter"),
        ({"input": "a", "encoding_format": "int8"}, 400, "encoding_format", "invalid_parameter"),
        ({"input": "a", "stream": True}, 400, "stream", "unknown_parameter"),
        ({"input": "a", "prompt_name": "qu"}, 400, "prompt_name", None),
        ({"input": [5], "prompt_name": "query"}, 400, "prompt_name", "unsupported_parameter"),
        ({"input": ["a"] * 2049}, 400, "input", None),
        ({"input": "sea " * 15}, 400, None, "context_length_exceeded"),
        ({"input": "sea " * 99999}, 400, None, "context_length_exceeded"),
        ({"input": [5, 999]}, 400, None, "invalid_request"),
        ({"input": "a", "model": "other"}, 404, "model", "model_not_found"),
    ]

    async def body(client: AsyncOpenAI, plain: httpx.AsyncClient) -> None:
        for sent, status, param, code in cases:
            answer = await plain.post("/v1/embeddings", json=sent)
            error = answer.json()["error"]
            assert (answer.status_code, error["param"], error["code"]) == (status, param, code), (sent, error)
            assert error["message"]
        with pytest.raises(openai.NotFoundError) as none:
            await client.completions.create(model="m", prompt="x")
        assert none.value.code == "no_generation"
        with pytest.raises(openai.NotFoundError) as chat:
            await client.chat.completions.create(model="m", messages=[{"role": "user", "content": "x"}])
        assert chat.value.code == "no_generation"
        assert (await plain.get("/health")).status_code == 200

    ask(engine_path, body)


def test_an_engine_refuses_requests_of_another_kind(engine_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(engine_path))
        connection.sendall(frame(Generate(id="x", prompt=[1], max_new_tokens=1)))
        frames, found = Frames(), None
        while not isinstance(found, Refused):
            for item in frames.feed(connection.recv(1 << 16)):
                found = decode_from_engine(item)
                if isinstance(found, Refused):
                    break
    assert (found.id, found.why) == ("x", "input")
