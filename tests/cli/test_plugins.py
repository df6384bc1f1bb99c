"""Another package's target, pass and weight format, found by entry points in a process of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

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


def run(site: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(site), SOURCES])
    return subprocess.run(
        [sys.executable, "-m", "optc", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )


def test_compiles_with_them(site: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run(site, "compile", source("llama"), "--target", "plaything", "--toy-words", "3", "-o", out, "--json")
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert [(row["name"], row["matched"]) for row in made["passes"]] == [("quantize-ternary", 14)]
    assert (out / "greeting.txt").read_text() == "toy toy toy"
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["target"], manifest["engine"]) == ("toy", "toy")
    entries = manifest["programs"]["model"]["contract"]["quantization"].values()
    assert {entry["format"] for entry in entries} == {"ternary"}
    assert run(site, "verify", out).returncode == 0


def test_lists_them(site: Path) -> None:
    listed = json.loads(run(site, "targets", "--json").stdout)["targets"]
    (toy,) = (row for row in listed if row["name"] == "toy")
    assert toy["options"] == [
        {
            "name": "toy-words",
            "takes": "an integer from 1 to 9",
            "default": "2",
            "help": "Words of the greeting.",
        }
    ]
    refused = run(site, "compile", source("llama"), "--target", "toy", "--toy-words", "10", "-o", "out", "--json")
    assert refused.returncode == 2
    assert json.loads(refused.stdout)["what"] == "'toy-words' cannot be '10'"
