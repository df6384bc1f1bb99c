"""The application by itself, asked without a network: faults of its own, and which origins it answers."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from optc.runtime.serving.counters import STATUSES, TOTAL, TPOT, TTFT, Counters
from optc.runtime.serving.http.app import build_app
from optc.runtime.serving.http.bodies import ResponseFormat
from optc.runtime.serving.http.state import ServerState
from optc.runtime.serving.request import EngineInfo, EngineMetrics, Grammar
from optc.runtime.serving.settings import ServeOptions, ServerConfig


def state(folder: Path, **options: Any) -> ServerState:
    Counters.create(folder / "counters", 1)
    config = ServerConfig(
        folder=folder, name="m", opener="", options=ServeOptions(**options), counters=str(folder / "counters")
    )
    return ServerState(config)


def ask(state: ServerState, method: str, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    """Call the ASGI application as a server does; what it raises after its answer is raised here."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()],
    }
    with contextlib.suppress(ZeroDivisionError):
        asyncio.run(build_app(state)(scope, receive, send))  # type: ignore[arg-type]
    found = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], found, b"".join(item["body"] for item in sent[1:])


def test_a_fault_of_the_server_has_the_form_of_every_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = state(tmp_path)
    monkeypatch.setattr(type(own.client), "info", property(lambda _: 1 // 0), raising=False)
    status, _, body = ask(own, "GET", "/health")
    assert status == 500
    assert json.loads(body)["error"]["type"] == "server_error"


def test_before_there_is_an_engine(tmp_path: Path) -> None:
    own = state(tmp_path)
    for path in ("/health", "/v1/models"):
        status, headers, body = ask(own, "GET", path)
        assert (status, headers["retry-after"]) == (503, "1")
        assert json.loads(body)["error"]["code"] == "engine_unavailable"
    status, _, body = ask(own, "GET", "/metrics")
    assert status == 200
    assert b"optc_engine_up 0" in body
    assert b'optc_requests_total{status="503"} 2' in body
    own.draining = True
    status, headers, body = ask(own, "GET", "/health")
    assert (status, headers["connection"], json.loads(body)["error"]["code"]) == (503, "close", "shutting_down")


@pytest.mark.parametrize(("origin", "allowed"), [("https://chat.example", True), ("https://evil.example", False)])
def test_origins_that_were_named(tmp_path: Path, origin: str, allowed: bool) -> None:
    own = state(tmp_path, cors_origin=("https://chat.example",))
    _, headers, _ = ask(own, "GET", "/metrics", origin=origin)
    assert headers.get("access-control-allow-origin") == (origin if allowed else None)
    status, headers, _ = ask(own, "OPTIONS", "/v1/completions", origin=origin, access_control_request_method="POST")
    assert (status == 200) == allowed


def test_counters_of_all_processes_add_up(tmp_path: Path) -> None:
    Counters.create(tmp_path / "counters", 2)
    rows = [Counters(tmp_path / "counters", row) for row in range(3)]
    for row, values in enumerate([(0.003, 0.02, 100.0), (0.02, 7.0)]):
        for value in values:
            rows[row].observe(TTFT, value)
    rows[0].observe(TPOT, 0.001)
    rows[1].observe(TOTAL, 0.01)
    for status in STATUSES:
        rows[1].count_status(status)
    rows[0].count_status(200)
    rows[2].count_start()
    info = EngineInfo(vocab_size=9, context_length=8, serves="rows", max_running=3, max_waiting=4, num_blocks=7)
    metrics = EngineMetrics(running=1, waiting=2, used_blocks=5, finished={"stop": 6}, host_us_per_step=250.0)
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(rows[0].text(info, metrics))
        for sample in family.samples
    }
    name = "optc_time_to_first_token_seconds"
    assert [samples[f"{name}_bucket", bound] for bound in ("0.005", "0.01", "0.025", "5.0", "10.0", "60.0", "+Inf")] == [
        1, 1, 3, 3, 4, 4, 5,
    ]  # fmt: skip
    assert samples[f"{name}_sum",] == pytest.approx(107.043)
    assert samples["optc_time_per_output_token_seconds_bucket", "0.001"] == 1
    assert samples["optc_request_seconds_count",] == 1
    assert (samples["optc_requests_total", "200"], samples["optc_requests_total", "504"]) == (2, 1)
    assert (samples["optc_engine_starts_total",], samples["optc_engine_up",]) == (1, 1)
    assert (samples["optc_kv_blocks_used",], samples["optc_engine_finished_total", "stop"]) == (5, 6)
    assert samples["optc_engine_host_seconds_per_step",] == 0.00025


def test_a_json_object_is_an_object() -> None:
    """A list is JSON as well, and not what clients of this format expect."""
    assert ResponseFormat(type="json_object").grammar() == Grammar(kind="json-schema", source='{"type":"object"}')
    assert ResponseFormat(type="text").grammar() is None
