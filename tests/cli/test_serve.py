"""`optc serve` as docs/serve.md has it: its commands are run as they stand, but for the port."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import optc
from conftest import EXAMPLE, ROOT
from once import short_artifact

pytestmark = pytest.mark.slow

PAGE = (ROOT / "docs" / "serve.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
COMMANDS = [line for _, block in BLOCKS for line in block.splitlines() if line.startswith(("optc ", "curl "))]
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the repository's, with what the page's first command makes (of fewer layers)."""
    folder = tmp_path_factory.mktemp("serve")
    (folder / "examples").symlink_to(EXAMPLE.parent)
    (folder / "out").mkdir()
    (folder / "out" / "fiction-paged").symlink_to(short_artifact("inductor-cpu", kv_cache="paged"))
    (folder / "keys.txt").write_text("one\ntwo\n")
    return folder


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def start(place: Path, command: str) -> tuple[subprocess.Popen[str], str]:
    """A server's process and its port."""
    _, *words = command.split()
    process = subprocess.Popen(
        [sys.executable, "-m", "optc", *words, "--port", "0"],
        cwd=place, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r"is ready at http://[\d.]+:(\d+) after", line)
    assert found is not None, (line, process.communicate())
    how = process.stdout.readline()
    assert how == "continuous batching: up to 32 requests in each step, on cpu; contexts of 2048 tokens\n"
    return process, found[1]


@pytest.fixture(scope="module")
def server(place: Path) -> Iterator[str]:
    """The port of the page's first server."""
    assert COMMANDS[1] == "optc serve out/fiction-paged"
    process, port = start(place, COMMANDS[1])
    yield port
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "SIGTERM: finishing what runs, at most 30 s\nstopped" in err


def test_clients_of_the_page(server: str, place: Path) -> None:
    (ask,) = [line for line in COMMANDS if line.startswith("curl ")]
    found = subprocess.run(["bash", "-c", ask.replace("8000", server)], capture_output=True, text=True, check=True)
    assert '"completion_tokens":20' in found.stdout
    (script,) = [text for kind, text in BLOCKS if kind == "python"]
    run = [sys.executable, "-c", script.replace("8000", server)]
    text = subprocess.run(run, capture_output=True, text=True, check=True, env=environment()).stdout
    assert len(text) > 20


def test_measuring(server: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    first, second = [line.split()[1:] for line in COMMANDS if line.startswith("optc bench")]
    short = ("--requests", "6", "--new-tokens", "4", "--prompt-length", "8")
    assert optc(*(word.replace("8000", server) for word in first), *short) == 0
    assert "8 at once: 6 requests" in capsys.readouterr().out
    assert (place / "load.png").read_bytes().startswith(b"\x89PNG")
    assert optc(*second, *short, "--rate", "50") == 0
    assert "4 a second: 6 requests" in capsys.readouterr().out


def test_keys(place: Path) -> None:
    (command,) = [line for line in COMMANDS if "--api-key-file" in line and "serve" in line.split()[1]]
    process, port = start(place, command)
    ask = ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", f"http://127.0.0.1:{port}/v1/models"]
    codes = [
        subprocess.run([*ask, *key], capture_output=True, text=True, check=True).stdout
        for key in ([], ["-H", "authorization: Bearer two"])
    ]
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert (codes, process.returncode) == (["401", "200"], 0)


def test_what_cannot_be_started(place: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    assert optc("serve", tmp_path / "nothing") == 3
    assert "the artifact does not exist" in capsys.readouterr().err
    keys = tmp_path / "keys"
    keys.write_text("\n")
    assert optc("serve", tmp_path, "--api-key-file", keys) == 2
    keys.write_text("a b")
    assert optc("serve", tmp_path, "--api-key-file", keys) == 2
    assert optc("serve", tmp_path, "--api-key-file", tmp_path / "none") == 3
    monkeypatch.setenv("OPTC_API_KEY", "sch\u00f6n")
    assert optc("serve", tmp_path) == 2
    monkeypatch.delenv("OPTC_API_KEY")
    capsys.readouterr()
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    assert optc("serve", tmp_path, "--port", "0") == 7  # a folder without a manifest
    assert "the folder has no manifest.json" in capsys.readouterr().err
    assert optc("serve", place / "out" / "fiction-paged", "--port", "0", "--token-budget", "8") == 2
    assert "a budget of 8 tokens leaves no room for prompts" in capsys.readouterr().err
