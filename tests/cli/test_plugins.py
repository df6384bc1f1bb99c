"""Another package's target, pass and weight format, found by entry points in a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import toy_package
from hf_folders import source

import optc

SOURCES = str(Path(optc.__file__).parents[1])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    toy_package.install(folder)
    return folder


_COMMANDS = """
import contextlib, io, json, sys
from optc.cli.main import main
found = []
for arguments in json.loads(sys.argv[1]):
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            main(arguments)
    except SystemExit as done:
        found.append((int(done.code or 0), out.getvalue()))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def made(site: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[int, Any]]]:
    """An artifact of the toy's target, and what each command says, one after another in one process: (code, output)."""
    out = tmp_path_factory.mktemp("made") / "out"
    compile_ = ["compile", source("llama", layers=1), "--target"]
    commands: dict[str, list[object]] = {
        "compile": [*compile_, "plaything", "--toy-words", "3", "-o", out, "--json"],
        "verify": ["verify", out, "--json"],
        "targets": ["targets", "--json"],
        "refused": [*compile_, "toy", "--toy-words", "10", "-o", "out", "--json"],
    }
    done = subprocess.run(
        [sys.executable, "-c", _COMMANDS, json.dumps([list(map(str, words)) for words in commands.values()])],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(site), SOURCES])},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers = [(code, json.loads(text)) for code, text in json.loads(done.stdout)]
    return out, dict(zip(commands, answers, strict=True))


def test_compiles_with_them(made: tuple[Path, dict[str, tuple[int, Any]]]) -> None:
    out, said = made
    code, found = said["compile"]
    assert code == 0
    assert [(row["name"], row["matched"]) for row in found["passes"]] == [("quantize-ternary", 7)]
    assert (out / "greeting.txt").read_text() == "toy toy toy"
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["target"], manifest["engine"]) == ("toy", "toy")
    entries = manifest["programs"]["model"]["contract"]["quantization"].values()
    assert {entry["format"] for entry in entries} == {"ternary"}
    assert said["verify"][0] == 0


def test_lists_them(made: tuple[Path, dict[str, tuple[int, Any]]]) -> None:
    _, said = made
    (toy,) = (row for row in said["targets"][1]["targets"] if row["name"] == "toy")
    assert toy["options"] == [
        {
            "name": "toy-words",
            "takes": "an integer from 1 to 9",
            "default": "2",
            "help": "Words of the greeting.",
        }
    ]
    code, refused = said["refused"]
    assert code == 2
    assert refused["what"] == "'toy-words' cannot be '10'"
