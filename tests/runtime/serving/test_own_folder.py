"""The folder of a server: gone at the end, and with the next server where the first was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from optc.runtime.serving.own_folder import own_folder

HOLDS = """
import time
from optc.runtime.serving.own_folder import own_folder
with own_folder() as folder:
    print(folder, flush=True)
    time.sleep(100)
"""


def test_folders_of_killed_servers_go_and_those_of_live_ones_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "optc-serve-a-file").write_text("not ours to remove")
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-c", HOLDS]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        theirs = Path(other.stdout.readline().strip())
        (theirs / "engine").touch()
        with own_folder() as first:
            assert first.stat().st_mode & 0o777 == 0o700
            assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == sorted(
                (first.name, theirs.name)
            )
        assert not first.exists()
        other.send_signal(signal.SIGKILL)
    assert theirs.exists()
    with own_folder() as second:
        assert [path for path in tmp_path.iterdir() if path.is_dir()] == [second]
    assert [path.name for path in tmp_path.iterdir()] == ["optc-serve-a-file"]
