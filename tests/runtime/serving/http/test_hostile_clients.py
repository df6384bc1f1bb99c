"""Clients that mean harm, or are broken: every one gets a refusal in OpenAI's form or is let go, and the rest goes on."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import socket
import time
from collections.abc import Iterator

import psutil
import pytest
from serving_fake_engine import next_token
from serving_server import Server, example_tokenizer, refusal, running, text_artifact

from optc.runtime.serving.settings import ServeOptions

TOKENS = example_tokenizer()
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
OPTIONS = ServeOptions(
    max_body_bytes=20_000, max_connections=50, max_running=2, max_waiting=3, kv_blocks=64, request_seconds=4
)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    environment = {"OPTC_FAKE_STEP": "0.01"}
    with running(text_artifact(), OPTIONS, keys=("first-key", "second"), environment=environment) as found:
        found.request = _with_key(found)  # type: ignore[method-assign]
        yield found
        found.request = _with_key(found)  # type: ignore[method-assign]
        assert found.settled("optc_kv_blocks_used", 0) == 0
        assert found.metric("optc_engine_starts_total") == 1
        assert found.end() == 0


def _with_key(server: Server):  # type: ignore[no-untyped-def]
    def request(method: str, path: str, body: object = None, headers: dict[str, str] | None = None):  # type: ignore[no-untyped-def]
        return Server.request(server, method, path, body, {"authorization": "Bearer second", **(headers or {})})

    return request


@pytest.fixture(autouse=True)
def _the_server_goes_on(server: Server) -> Iterator[None]:
    yield
    server.settled("optc_requests_running", 0)
    body = {"prompt": "The old man", "max_tokens": 3}
    prompt = TOKENS.encode("The old man")
    text = TOKENS.decode([next_token(prompt, index) for index in range(3)])
    assert server.post("/v1/completions", body)[1]["choices"][0]["text"] == text


def post(data: bytes, extra: bytes = b"authorization: Bearer second\r\n") -> bytes:
    return HEAD + extra + b"content-length: %d\r\n\r\n" % len(data) + data


def parsed(answer: bytes) -> tuple[int, object]:
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


BODIES = {
    "not JSON": b"{",
    "nothing": b"",
    "not an object": b"[1]",
    "not UTF-8": b'{"prompt": "\xff\xfe"}',
    "half a character": b'{"prompt": "\\ud800"}',
    "half a character in a name": b'{"\\ud800": 1, "prompt": "x"}',
    "NaN": b'{"prompt": "x", "temperature": NaN}',
    "Infinity": b'{"prompt": "x", "temperature": Infinity}',
    "a number beyond float64": b'{"prompt": "x", "temperature": 1e999}',
    "an integer beyond 64 bits": b'{"prompt": "x", "seed": 99999999999999999999999999}',
    "billions of answers": b'{"prompt": "x", "n": 4000000000}',
    "a million answers": b'{"prompt": "x", "n": 1000000}',
    "a negative token": b'{"prompt": [-1]}',
    "a token beyond the vocabulary": b'{"prompt": [99999999999]}',
    "a boolean as a token": b'{"prompt": [true]}',
    "deep lists": b'{"prompt": ' + b"[" * 9000 + b"]" * 9000 + b"}",
    "deep objects": b'{"prompt": "x", "metadata": ' + b'{"a":' * 2000 + b"1" + b"}" * 2000 + b"}",
    "a long name": b'{"prompt": "x", "' + b"k" * 9000 + b'": 1}',
    "a text that no context holds": b'{"prompt": "' + b" a" * 9000 + b'"}',
    "an endless stop": b'{"prompt": "x", "stop": "' + b"a" * 2000 + b'"}',
    "an empty stop": b'{"prompt": "x", "stop": ""}',
    "many stops": b'{"prompt": "x", "stop": [' + b",".join([b'"a"'] * 50) + b"]}",
    "a field with a line break": b'{"prompt": "x", "a\\r\\nx-evil: 1": 1}',
    "a model with a line break": b'{"prompt": "x", "model": "a\\r\\nset-cookie: 1"}',
}


@pytest.mark.parametrize("name", BODIES)
def test_bodies(server: Server, name: str) -> None:
    answer = server.request("POST", "/v1/completions", BODIES[name])
    error = refusal(answer[:2], 404 if name == "a model with a line break" else 400)
    assert len(error["message"]) < 300
    assert not {"x-evil", "set-cookie"} & {key.lower() for key in answer[2]}


def test_odd_texts_are_answered(server: Server) -> None:
    for body in (b'{"prompt": "a\\u0000b", "max_tokens": 2}', b'{"prompt": "x", "prompt": "y", "max_tokens": 2}'):
        status, found, _ = server.request("POST", "/v1/completions", body)
        assert (status, found["usage"]["completion_tokens"]) == (200, 2)
    twice = TOKENS.decode([next_token(TOKENS.encode("y"), index) for index in range(2)])
    assert found["choices"][0]["text"] == twice  # of two equal keys the last one counts, as everywhere


@pytest.mark.parametrize(
    "head",
    [
        b"GARBAGE\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET \xff\xfe HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: localhost\r\na b: c\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"authorization: Bearer second\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),  # what TLS begins with
    ],
)
def test_what_is_not_http(server: Server, head: bytes) -> None:
    refusal(parsed(server.raw(head)), 400)


def test_headers_that_are_too_long_or_too_many(server: Server) -> None:
    for extra in (b"x: " + b"a" * 100_000 + b"\r\n", b"".join(b"x-%d: 1\r\n" % i for i in range(10_000))):
        refusal(parsed(server.raw(HEAD + extra + b"\r\n")), 431)
    refusal(parsed(server.raw(b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n")), 431)


def test_bodies_that_are_too_long(server: Server) -> None:
    text = b'{"prompt": "' + b"a" * 3_000_000 + b'"}'
    error = refusal(server.request("POST", "/v1/completions", text)[:2], 413)
    assert error["message"] == "the body has more than 20000 bytes"
    chunked = HEAD + b"authorization: Bearer second\r\ntransfer-encoding: chunked\r\n\r\n"
    refusal(parsed(server.raw(chunked + (b"2710\r\n" + b"a" * 10_000 + b"\r\n") * 5 + b"0\r\n\r\n")), 413)


def test_many_bodies_on_their_way(server: Server) -> None:
    head = HEAD + b"authorization: Bearer second\r\ncontent-length: 20000\r\n\r\n"
    open_ones, refused = [], 0
    for _ in range(45):
        connection = socket.create_connection(("127.0.0.1", server.port), timeout=1)
        connection.sendall(head + b"a" * 19_900)
        open_ones.append(connection)
    time.sleep(0.5)
    for connection in open_ones:
        connection.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            refused += b"too_many_bodies" in connection.recv(1000)
        connection.close()
    assert 5 <= refused <= 13  # 32 of them are held


def test_keys(server: Server) -> None:
    for header in (
        b"",
        b"authorization: Bearer first\r\n",
        b"authorization: first-key\r\n",
        b"authorization: \xff\r\n",
    ):
        head = b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n" + header + b"\r\n"
        assert refusal(parsed(server.raw(head)), 401)["code"] == "invalid_api_key"
    assert server.request("GET", "/v1/models", headers={"authorization": "bearer first-key"})[0] == 200
    for path in ("/health", "/"):
        assert Server.request(server, "GET", path)[0] == 200
    for path in ("/metrics", "/tokenize", "/nothing"):
        assert Server.request(server, "GET", path)[0] == 401


def test_pages_of_other_sites(server: Server) -> None:
    """A simple POST of a page has no JSON type; a name that was made to point here is another host's."""
    refusal(server.request("POST", "/v1/completions", b"{}", {"content-type": "text/plain"})[:2], 415)
    refusal(server.request("GET", "/v1/models", headers={"host": "evil.example:8000"})[:2], 403)
    assert server.request("GET", "/v1/models", headers={"host": "[::1]:8000"})[0] == 200
    headers = server.request("OPTIONS", "/v1/completions", headers={"origin": "https://evil.example"})[2]
    assert not [name for name in headers if name.lower().startswith("access-control")]


def test_a_queue_that_is_full(server: Server) -> None:
    body = {"prompt": "x", "max_tokens": 30}
    with concurrent.futures.ThreadPoolExecutor(12) as threads:
        found = list(threads.map(lambda _: server.request("POST", "/v1/completions", body), range(12)))
    statuses = [status for status, _, _ in found]
    assert set(statuses) == {200, 429}
    refused = next(item for item in found if item[0] == 429)
    assert refusal(refused[:2], 429)["code"] == "queue_full"
    assert refused[2]["retry-after"] == "1"
    many = server.post("/v1/completions", {"prompt": "x", "n": 20, "max_tokens": 4})
    refusal(many, 429)  # one of its answers found no place, so none is given


def test_a_request_that_no_pool_holds(server: Server) -> None:
    error = refusal(server.post("/v1/completions", {"prompt": "x", "max_tokens": 1500}), 400)
    assert error["message"] == "the request does not fit the pool"


def test_a_request_takes_too_long(server: Server) -> None:
    refusal(server.post("/v1/completions", {"prompt": "x", "max_tokens": 900}), 504)
    body = json.dumps({"prompt": "x", "max_tokens": 900, "stream": True}).encode()
    answer = server.raw(post(body, b"authorization: Bearer second\r\nconnection: close\r\n"))
    assert answer.startswith(b"HTTP/1.1 200")
    assert b'"code":"timeout"' in answer
    assert b"[DONE]" not in answer


def test_many_connections_and_slow_heads(server: Server) -> None:
    idle = []
    for _ in range(50):
        connection = socket.create_connection(("127.0.0.1", server.port), timeout=20)
        connection.sendall(b"GET /health HTTP/1.1\r\nx: ")  # and nothing more
        idle.append(connection)
    time.sleep(0.2)
    found = server.raw(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n")
    assert refusal(parsed(found), 503)["code"] == "too_many_connections"
    for connection in idle:
        connection.close()
    time.sleep(0.2)
    assert server.request("GET", "/health")[0] == 200


def test_clients_that_leave(server: Server) -> None:
    body = post(b'{"prompt": "x", "max_tokens": 900, "stream": true}')
    plain = post(b'{"prompt": "x", "max_tokens": 900}')
    name = 'optc_engine_finished_total{reason="cancelled"}'
    before = server.metric(name)
    for count, (data, reads) in enumerate(
        ((body, True), (plain, False), (body + body + body, True)), 1
    ):  # the last one pipelines
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
            connection.sendall(data)
            if reads:
                assert connection.recv(100).startswith(b"HTTP/1.1 200")
            else:
                assert server.settled("optc_requests_running", 1) == 1
        assert server.settled(name, before + count, seconds=3) == before + count  # before any limit of time


def test_pipelined_requests_are_answered_in_order(server: Server) -> None:
    one = post(b'{"prompt": "The old man", "max_tokens": 3}')
    last = post(b'{"prompt": "x", "max_tokens": 2}', b"authorization: Bearer second\r\nconnection: close\r\n")
    answer = server.raw(one + one + last)
    assert answer.count(b"HTTP/1.1 200 OK") == 3
    assert [b'"completion_tokens":3' in part for part in answer.split(b"HTTP/1.1 ")[1:]] == [True, True, False]
    flood = server.raw(b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n" * 20_000)
    assert flood.count(b"HTTP/1.1 200 OK") < 20_000  # the connection is cut


def test_a_client_that_reads_nothing_costs_little(server: Server) -> None:
    worker = psutil.Process(server.children()["worker"])
    before = worker.memory_info().rss
    body = post(b'{"prompt": [' + b"300," * 400 + b'300], "n": 2, "max_tokens": 100, "stream": true, "logprobs": 20}')
    connections = []
    for _ in range(2):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(body)
        connections.append(connection)
    time.sleep(4.1)
    assert server.settled("optc_requests_running", 0) == 0
    assert worker.memory_info().rss - before < 20 << 20
    for connection in connections:
        connection.close()
