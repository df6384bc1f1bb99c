"""Many clients at once before a real engine whose pool is too small for them: nothing is lost, leaked, or another's."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from once import short_artifact
from serving_server import Server, refusal, running

import optc
from optc.runtime.serving.settings import ServeOptions

pytestmark = pytest.mark.slow

BLOCKS = 24  # of 16 tokens: a fifth of what 64 requests would hold
PROMPTS = [
    "The old man looked at the sea, and",
    "Once",
    "It was a dark night, and the wind",
    "She said nothing. The house was empty now, and the garden, where they had walked so often, lay under snow",
    "In the morning",
    "The captain gave the order, and",
    "He had never",
    "A letter came from London, which",
]
NEW = 24
HEAD = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\nconnection: close\r\n"


@pytest.fixture(scope="module")
def artifact() -> Path:
    return short_artifact("inductor-cpu", kv_cache="paged")


@pytest.fixture(scope="module")
def alone(artifact: Path) -> dict[str, str]:
    """What each prompt gets by itself, from a session without any server."""
    model = optc.load(artifact, threads=1)
    found = {prompt: str(model.generate(prompt, max_new_tokens=NEW).text) for prompt in PROMPTS}
    model.close()
    return found


@pytest.fixture(scope="module")
def server(artifact: Path) -> Iterator[Server]:
    options = ServeOptions(kv_blocks=BLOCKS, max_running=32, threads=1, workers=2, max_body_bytes=10_000)
    with running(artifact, options, opener="optc.runtime.serving.engine_process:open_artifact") as found:
        yield found


async def ask(port: int, body: bytes, leave_after: int | None) -> bytes:
    """Everything that the server says, or as many pieces of it until this client has had enough."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"{HEAD}content-length: {len(body)}\r\n\r\n".encode() + body)
    found, pieces = b"", 0
    while leave_after is None or pieces < leave_after:
        piece = await reader.read(1 << 16)
        if not piece:
            break
        found, pieces = found + piece, pieces + 1
    writer.close()
    return found


def text_of(answer: bytes) -> str:
    """The text of a stream, out of its chunks."""
    head, _, rest = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), answer
    events = [line.removeprefix(b"data: ") for line in rest.split(b"\r\n") if line.startswith(b"data: ")]
    rows = [item.removeprefix(b"data: ") for event in events for item in event.split(b"\n\n") if item]
    assert rows[-1] == b"[DONE]"
    return "".join(json.loads(row)["choices"][0]["text"] for row in rows[:-1])


def test_many_clients(server: Server, alone: dict[str, str]) -> None:
    draw, port = random.Random(5), server.port
    jobs: list[tuple[str, bytes, int | None]] = []
    for i in range(64):
        prompt = PROMPTS[i % len(PROMPTS)]
        body = json.dumps({"prompt": prompt, "max_tokens": NEW, "temperature": 0, "stream": True}).encode()
        jobs.append((prompt, body, draw.choice((None, None, 0, 1, 3, 8))))
    for bad in (
        b"{",
        b'{"prompt": 5}',
        b'{"prompt": "' + b"a" * 20_000 + b'"}',
        b'{"prompt": "x", "max_tokens": 4000}',
    ):
        jobs.append(("", bad, None))
    draw.shuffle(jobs)

    async def all_of_them() -> list[bytes]:
        return await asyncio.gather(*(ask(port, body, leave) for _, body, leave in jobs))

    answers = asyncio.run(asyncio.wait_for(all_of_them(), 120))
    whole = 0
    for (prompt, _, leave), answer in zip(jobs, answers, strict=True):
        if not prompt:
            head, _, rest = answer.partition(b"\r\n\r\n")
            status = int(head.split()[1])
            refusal((status, json.loads(rest)), status)
            assert status in (400, 413)
        elif leave is None:
            assert text_of(answer) == alone[prompt]
            whole += 1
    assert whole > 15
    for name in ("optc_kv_blocks_used", "optc_requests_running", "optc_requests_waiting"):
        assert server.settled(name, 0) == 0
    assert server.metric("optc_preemptions_total") > 0  # or the pool was not too small
    assert server.metric("optc_engine_starts_total") == 1
    # an answer that holds to a schema
    schema = {"schema": {"type": "string", "enum": ["yes", "no"]}}
    body = {"prompt": "Once", "max_tokens": 60, "response_format": {"type": "json_schema", "json_schema": schema}}
    answer = server.post("/v1/completions", body)
    if importlib.util.find_spec("llguidance") is None:
        assert "grammar" in refusal(answer, 400)["message"]
    else:
        assert json.loads(answer[1]["choices"][0]["text"]) in ("yes", "no")
    # and then one alone, and a clean end
    found = server.post("/v1/completions", {"prompt": PROMPTS[0], "max_tokens": NEW, "temperature": 0})[1]
    assert found["choices"][0]["text"] == alone[PROMPTS[0]]
    assert server.end() == 0
