"""A part of `make faults`: a checkpoint's writer, struck at each of its file operations."""

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
def test_a_checkpoint_is_old_or_new_and_nothing_lies_beside_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fuzz.disk", "--work", str(tmp_path), "--writers", "checkpoint", "--json"]
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
    found = json.loads((tmp_path / "figures.json").read_text())["writers"]["checkpoint"]
    assert found["wrong"] == []
    assert found["operations"] >= 15
    assert found["struck"] == 6 * found["operations"]
