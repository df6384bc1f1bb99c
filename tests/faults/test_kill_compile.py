"""SIGKILL while `optc compile` replaces an artifact: the old one stands, whole, or the new one does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hf_folders import source

DRIVER = Path(__file__).resolve().parents[1] / "compile_kill_driver.py"


@pytest.mark.slow
def test_kill_leaves_old_artifact_or_new(tmp_path: Path) -> None:
    """Each step of publishing by itself: tests/compiler/artifact/test_publishing.py."""
    output = tmp_path / "artifact"
    command = [sys.executable, DRIVER, source("llama", 1), output, "0.9", "0.97"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    old, new = json.loads(done.stdout)
    assert new != old
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]  # what the kills left is gone
