"""Load on a server: what is asked, when, and what the clients' figures say of it."""

from __future__ import annotations

import json
import threading
import xml.etree.ElementTree
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from command_line import optc, optc_json
from serving_server import Server, running, text_artifact

from optc.compiler.diagnostics import InputError, UsageError
from optc.runtime.measuring.load.http_client import Client, Timing
from optc.runtime.measuring.load.plot import check_plot, load_plot, load_svg
from optc.runtime.measuring.load.run import Slo, figures, percentiles
from optc.runtime.measuring.load.workload import TraceRow, Workload, read_trace
from optc.runtime.serving.settings import ServeOptions

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    environment = {"OPTC_FAKE_STEP": "0.005"}
    with running(text_artifact(), ServeOptions(max_running=8), keys=("key",), environment=environment) as found:
        yield found


def workload(**changes: object) -> Workload:
    given = {"prompt_tokens": 100, "new_tokens": 40, "longest": 2048, "vocab_size": 8192, "body": {"model": "m"}}
    return Workload(**{**given, **changes})  # type: ignore[arg-type]


def test_lengths() -> None:
    assert workload().lengths(3) == [(100, 40)] * 3
    drawn = np.array(workload(sigma=0.5).lengths(4000))
    assert np.median(drawn, axis=0) == pytest.approx([100, 40], rel=0.03)
    assert np.log(drawn[:, 0]).std() == pytest.approx(0.5, rel=0.05)
    assert workload(sigma=3, longest=300).lengths(500) == workload(sigma=3, longest=300).lengths(500)
    assert max(prompt + new for prompt, new in workload(sigma=3, longest=300).lengths(500)) == 300
    rows = (TraceRow(7, 3), TraceRow(9, 5))
    assert workload(trace=rows).lengths(3) == [(7, 3), (9, 5), (7, 3)]


def test_bodies_hold_what_was_asked_for() -> None:
    first, second = (json.loads(body) for body in workload(sigma=0.3).bodies(2))
    assert [len(first["prompt"]), first["max_tokens"]] == list(workload(sigma=0.3).lengths(1)[0])
    assert (first["model"], first["stream"], first["ignore_eos"]) == ("m", True, True)
    assert first["prompt"][:8] != second["prompt"][:8]
    assert all(100 <= token < 8192 for token in first["prompt"])


def test_arrivals() -> None:
    times = workload().arrivals(4000, rate=20)
    gaps = np.diff(times)
    assert times[0] == 0
    assert gaps.mean() == pytest.approx(1 / 20, rel=0.05)
    assert gaps.std() == pytest.approx(1 / 20, rel=0.08)  # of an exponential both are the same
    rows = tuple(TraceRow(5, 5, at) for at in (0.0, 1.0, 1.5))
    assert workload(trace=rows).arrivals(5, rate=1.5) == pytest.approx([0, 1, 1.5, 2, 3])


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "the trace is empty"),
        ('{"prompt_tokens": 0, "output_tokens": 5}', "a line of the trace cannot be read"),
        ('{"prompt_tokens": 5}', "a line of the trace cannot be read"),
        ("[1]", "a line of the trace cannot be read"),
        (f'{{"more": {"[" * 100_000}', "a line of the trace cannot be read"),
        (
            '{"prompt_tokens":1,"output_tokens":2,"at":3}\n{"prompt_tokens":1,"output_tokens":2,"at":1}',
            "the times of the trace go backwards",
        ),
    ],
)
def test_traces_that_cannot_be_read(text: str, what: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_trace(path)
    assert caught.value.what == what


def test_intervals_are_those_of_a_bootstrap() -> None:
    values = np.random.default_rng(4).lognormal(size=400)
    found = percentiles(values.tolist())
    assert found is not None
    picks = np.random.default_rng(5).integers(0, 400, (4000, 400))
    for percent in (50, 90):
        drawn = np.percentile(values[picks], percent, axis=1)
        assert found[f"p{percent}"]["value"] == np.percentile(values, percent)
        assert found[f"p{percent}"]["ci95"] == pytest.approx(np.percentile(drawn, [2.5, 97.5]), rel=0.05)
    assert percentiles([]) is None
    one = percentiles([3.0])
    assert one is not None
    assert one["p99"] == {"value": 3.0, "ci95": [3.0, 3.0]}


def test_figures_by_hand() -> None:
    """Two answers and a failure: sent at 0, 1, 1; the first tokens after 0.5 and 1 s, then 4 in 1 s and 2 in 1 s."""
    good = Timing(0.0, 0.5, 1.5, [0.25] * 4, 10, 5)
    slow = Timing(1.0, 2.0, 3.0, [1.0], 20, 2)
    found = figures([good, slow, Timing(1.0, error="500")], Slo(ttft_ms=600, tpot_ms=250))
    assert (found["requests"], found["failed"], found["first_error"], found["seconds"]) == (3, 1, "500", 3.0)
    assert (found["output_tokens"], found["prompt_tokens"]) == (7, 30)
    assert found["output_tokens_per_s"] == pytest.approx(7 / 3)
    assert found["requests_per_s"] == pytest.approx(2 / 3)
    assert found["goodput_requests_per_s"] == pytest.approx(1 / 3)
    assert [found[name]["mean"] for name in ("ttft_ms", "tpot_ms", "gap_ms", "e2e_ms")] == [750, 625, 400, 1750]


def test_a_server_is_measured(server: Server, tmp_path: Path, capsys: Capture) -> None:
    key, plot = tmp_path / "key", tmp_path / "load.svg"
    key.write_text("key\n")
    common = ("--serve", server.url, "--api-key-file", key, "--new-tokens", 20, "--prompt-length", 30)
    found = optc_json(
        capsys,
        "bench",
        *common,
        "--concurrency",
        2,
        "--concurrency",
        8,
        "--requests",
        16,
        "--warmup",
        2,
        "--plot",
        plot,
    )
    assert [run["concurrency"] for run in found["runs"]] == [2, 8]
    for run in found["runs"]:
        assert (run["requests"], run["failed"]) == (16, 0)
        assert (run["output_tokens"], run["prompt_tokens"]) == (16 * 20, 16 * 30)
        assert run["tpot_ms"]["p50"]["value"] > 4.5  # a step of the engine takes 5 ms
        assert run["e2e_ms"]["p50"]["value"] > 95
    # eight share each step that two share
    assert found["runs"][1]["output_tokens_per_s"] > 2 * found["runs"][0]["output_tokens_per_s"]
    assert found["server"]["vocab_size"] == 8192
    root = xml.etree.ElementTree.parse(plot).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert len(root.findall(".//{*}circle")) == 2 * 5
    trace = tmp_path / "trace.jsonl"
    trace.write_text(
        '{"prompt_tokens": 9, "output_tokens": 4, "at": 0}\n{"prompt_tokens": 5, "output_tokens": 8, "at": 1}'
    )
    found = optc_json(capsys, "bench", *common[:4], "--rate", 40, "--trace", trace, "--requests", 10)
    assert (found["runs"][0]["output_tokens"], found["runs"][0]["rate"]) == (60, 40)
    assert optc("bench", *common, "--requests", 4, "--slo-ttft-ms", 1) == 0
    shown = capsys.readouterr().out
    assert "8 at once: 4 requests" in shown
    assert "0.00 with TTFT within 1 ms" in shown


class Embedding(BaseHTTPRequestHandler):
    """A server of embeddings by hand, with OpenAI's answers; it refuses one text in six."""

    protocol_version = "HTTP/1.1"
    asked: ClassVar[list[list[int]]] = []

    def do_GET(self) -> None:
        self.answer(200, {"data": [{"id": "e", "task": "embed", "vocab_size": 50, "max_model_len": 64}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        assert (self.path, body["model"], set(body)) == ("/v1/embeddings", "e", {"model", "input"})
        self.asked.append(body["input"])
        usage = {"prompt_tokens": len(body["input"]), "total_tokens": len(body["input"])}
        given = {"object": "list", "data": [{"index": 0, "embedding": [0.5, 1.0]}], "usage": usage}
        self.answer(*((503, {"error": "busy"}) if len(self.asked) % 6 == 0 else (200, given)))

    def answer(self, status: int, value: object) -> None:
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        """Nothing."""


def test_a_server_of_embeddings_is_measured(tmp_path: Path, capsys: Capture) -> None:
    plot, served = tmp_path / "load.svg", ThreadingHTTPServer(("127.0.0.1", 0), Embedding)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    common = ("bench", "--serve", f"http://127.0.0.1:{served.server_port}", "--prompt-length", 9)
    found = optc_json(capsys, *common, "--requests", 12, "--concurrency", 3, "--warmup", 0, "--plot", plot)
    (run,) = found["runs"]
    assert (found["server"]["task"], found["lengths"]["new"]) == ("embed", 0)
    assert (run["requests"], run["failed"], run["prompt_tokens"], run["output_tokens"]) == (12, 2, 10 * 9, 0)
    assert run["first_error"].startswith("503")
    assert [len(tokens) for tokens in Embedding.asked] == [9] * 12
    assert run["prompt_tokens_per_s"] == pytest.approx(90 / run["seconds"])
    assert (run["ttft_ms"], run["tpot_ms"]) == (None, None)
    assert 0 < run["e2e_ms"]["p50"]["value"] < run["seconds"] * 1e3
    assert len(xml.etree.ElementTree.parse(plot).getroot().findall(".//{*}circle")) == 3
    assert optc(*common, "--requests", 2, "--rate", 50) == 0
    assert "prompts of 9 tokens" in capsys.readouterr().out
    for flags in (("--temperature", 0.5), ("--slo-tpot-ms", 9)):
        assert optc(*common, *flags) == 2
        assert f"{flags[0]} has no effect on a model that gives embeddings" in capsys.readouterr().err
    served.shutdown()


def test_what_contradicts_itself(server: Server, tmp_path: Path, capsys: Capture) -> None:
    cases = {
        "two kinds of load": ("--serve", "--rate", 1, "--concurrency", 1),
        "--batch has no effect with --serve": ("--serve", "--batch", 2),
        "takes one --prompt-length": ("--serve", "--prompt-length", 2, "--prompt-length", 3),
        "no effect on a server that runs already": ("--serve", "--threads", 2),
        "--rate has no effect without --serve": ("--rate", 2),
        "--plot has no effect without --serve": ("--plot", "x.svg"),
    }
    for what, flags in cases.items():
        assert optc("bench", "http://127.0.0.1:9", *flags) == 2
        assert what in capsys.readouterr().err
    assert optc("bench", "--serve", server.url, "--requests", 2) == 3  # without its key
    assert "the server answers 401" in capsys.readouterr().err
    for url in ("http://", "http://a b", "http://x:99999", "http://x:0"):
        assert optc("bench", "--serve", url) == 3
        assert "not an address of a server" in capsys.readouterr().err


def test_addresses_with_and_without_v1() -> None:
    assert Client("http://x:1/v1")._base == Client("http://x:1/")._base == "/v1"
    assert Client("https://x/a/v1/")._base == "/a/v1"


def test_a_picture_in_pixels(tmp_path: Path) -> None:
    """A point of each line where the SVG has it, in the line's colour; the grid between them."""
    image = pytest.importorskip("PIL.Image")

    def run(count: int, rate: float) -> dict[str, Any]:
        times = {name: {"value": rate * 2} for name in ("p50", "p99")}
        return {"concurrency": count, "output_tokens_per_s": rate, "ttft_ms": times, "tpot_ms": times}

    runs, path = [run(1, 40.0), run(4, 80.0)], tmp_path / "load.PNG"
    check_plot(path)
    path.write_bytes(load_plot(runs, "a <title>", path))
    with image.open(path) as found:
        found.load()
        assert (found.format, found.size) == ("PNG", (2160, 528))
        root = xml.etree.ElementTree.fromstring(load_svg(runs, ""))
        for number, panel in enumerate(root.findall(".//{*}g")):
            for circle in panel.findall("{*}circle"):
                x, y = (float(circle.get(name) or 0) for name in ("cx", "cy"))
                assert found.getpixel((round(2 * (number * 360 + x)), round(2 * (24 + y)))) == (0x24, 0x57, 0xC5)
            grid = float(panel.findall("{*}path")[3].get("d", "").split()[1].split("H")[0])
            assert found.getpixel((2 * (number * 360 + 340), round(2 * (24 + grid)))) == (0xD9, 0xDA, 0xDE)
    assert load_plot(runs, "a", tmp_path / "load.svg").startswith(b"<svg")
    with pytest.raises(UsageError, match=r"--plot load\.pdf is neither \.svg nor \.png"):
        check_plot(tmp_path / "load.pdf")


def test_a_plot_of_one_run() -> None:
    run = {"concurrency": None, "rate": 2.5, "output_tokens_per_s": 0.0, "ttft_ms": None, "tpot_ms": None}
    assert "<svg" in load_svg([run], "a <title>")
    assert "a &lt;title&gt;" in load_svg([run], "a <title>")
