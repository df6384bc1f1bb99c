"""Lines of progress without a terminal: at the start, while it goes on, at the end."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import optc

from optc.heartbeat import EVERY, heartbeat
from optc.progress import part, progress

LONG = {
    "compile": ("compile", "nowhere", "--target", "onnx-cpu", "-o", "out"),
    "quantize": ("quantize", "nowhere", "--quant", "rtn", "-o", "out"),
    "search": ("search", "nowhere", "--target", "onnx-cpu", "--text", "nothing", "-o", "out"),
    "train": ("train", "--recipe", "finetune", "--model", "nowhere", "--text", "nothing", "-o", "out"),
    "eval": ("eval", "nowhere", "--text", "nothing"),
    "compare": ("compare", "nowhere", "elsewhere"),
    "bench": ("bench", "nowhere"),
    "bench --serve": ("bench", "--serve", "http://127.0.0.1:9"),
}
"""Commands that may take minutes, on what is not there."""


@pytest.mark.parametrize("name", LONG)
def test_long_commands_say_that_they_begin_and_end(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert optc(*LONG[name]) in (2, 3, 7)
    said = capsys.readouterr().err.splitlines()
    title = said[0].removesuffix(": begun")
    assert said[0] == f"{title}: begun"
    assert said[1].startswith(f"{title}: stopped after ")


_BEGIN = """
import json, sys
import click
import optc.progress
from optc.cli.main import main

def begun(title, say):
    raise click.Abort

optc.progress.heartbeat = begun
loaded = {}
for name, args in json.loads(sys.argv[1]).items():
    try:
        main(list(args))
    except SystemExit:
        pass
    loaded[name] = sorted({"torch", "transformers", "onnxruntime"} & sys.modules.keys())
print(json.dumps(loaded))
"""


def test_they_begin_before_what_takes_long_is_imported() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _BEGIN, json.dumps(LONG)], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stderr.count("interrupted") == len(LONG)
    assert json.loads(done.stdout) == {name: [] for name in LONG}


def timeless(line: str) -> str:
    """Whatever the machine does beside it."""
    return re.sub(r"\d+ s\b", "N s", line)


def test_lines_go_on_at_least_every_ten_seconds() -> None:
    assert EVERY <= 10
    lines: list[str] = []
    with heartbeat("training", lines.append, every=0.05) as update:
        update("step 3")
        time.sleep(0.12)
    assert [timeless(line) for line in lines[:2]] == ["training: begun", "training: N s, step 3"]
    assert timeless(lines[-1]) == "training: done after N s"
    with pytest.raises(ValueError, match="negative"), heartbeat("short", lines.append):
        time.sleep(-1)
    assert [timeless(line) for line in lines[-2:]] == ["short: begun", "short: stopped after N s"]


def test_parts_are_notes_of_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("optc.progress.heartbeat", functools.partial(heartbeat, every=0.02))
    with progress("evaluating"), part("windows", 3) as update:
        update(2, "2 of 3")
        time.sleep(0.05)
    said = [timeless(line) for line in capsys.readouterr().err.splitlines()]
    assert (said[0], said[-1]) == ("evaluating: begun", "evaluating: done after N s")
    assert set(said[1:-1]) == {"evaluating: N s, windows: 2 of 3"}
    with part("windows", 3) as update:  # of no command: Python did not ask for a bar
        update(1, "1 of 3")
        time.sleep(0.03)
    assert capsys.readouterr().err == ""


def test_parts_are_bars_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    with progress("evaluating"), part("windows", 3) as update:
        update(2, "2 of 3")
    said = capsys.readouterr().err
    assert "evaluating" in said
    assert "windows" in said
    assert "begun" not in said
