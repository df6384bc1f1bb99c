"""A part of `make faults`: the writers of a checkpoint and of a rounded group, struck at each of its file operations."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or shutil.which("cc") is None, reason="needs Linux and a C compiler")
def test_files_are_old_or_new_and_nothing_lies_beside_them(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fuzz.disk", "--work", str(tmp_path), "--writers", "checkpoint,group", "--json"]
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    done = subprocess.run(
        [*command, str(tmp_path / "figures.json")],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["wrong"] == 0
    assert figures["reruns"] >= 10
    for name, least in (("checkpoint", 15), ("group", 4)):
        found = figures["writers"][name]
        assert found["wrong"] == []
        assert found["operations"] >= least
        assert found["struck"] == 7 * found["operations"]
