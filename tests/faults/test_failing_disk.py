"""A part of `make faults`: the writers of a checkpoint and of a rounded group, struck at each of its file operations; and
what it found once, each by itself."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from artifacts import make_artifact
from conftest import ROOT
from fuzz import disk
from fuzz.writer import Kind, Writer
from fuzz.writers import COMPUTED

from optc.compiler import files
from optc.compiler.artifact import trust
from optc.compiler.artifact.folder import sign_artifact, verify
from optc.compiler.diagnostics import InputError, ResourceError
from optc.compiler.kernels.cpu.toolchain import run_compiler
from optc.exporters.trt.build_plan import new_files


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or shutil.which("cc") is None, reason="needs Linux and a C compiler")
def test_files_are_old_or_new_and_nothing_lies_beside_them(tmp_path: Path) -> None:
    words = ["--work", str(tmp_path), "--writers", "checkpoint,group", "--jobs", "2", "--json"]
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-m", "fuzz.disk", *words, str(tmp_path / "figures.json")],
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
        assert found["operations_struck"] == found["operations"] >= least
        assert found["struck"] == 7 * found["operations"]


def test_what_writers_compute_once_is_still_where_it_was() -> None:
    """Most writers are made ready by the campaign alone."""
    names = [*COMPUTED, ("optc.api", "write_artifact"), ("optc.api", "capture_resolved")]
    for module, name in names:
        if "executorch" not in module or importlib.util.find_spec("executorch"):
            assert callable(getattr(importlib.import_module(module), name)), (module, name)


def test_the_figures_of_a_run_that_was_cut(tmp_path: Path) -> None:
    rows = disk.Rows(tmp_path / "rows")
    rows.add({"operations": 2, "setup_s": 1.0})
    for number, kind in ((1, "kill"), (1, "EIO once"), (2, "kill")):
        rows.add({"number": number, "kind": kind, "outcome": f"{kind}: old", "rerun": number == 1, "seconds": 0.5})
    rows.add({"wrong": "something"})
    found = disk.tally(rows.read(), kinds=2)
    assert (found["operations"], found["operations_struck"], found["struck"], found["seconds"]) == (2, 1, 3, 1.5)
    assert (found["reruns"], found["wrong"]) == ({"kill": 1, "EIO once": 1}, ["something"])
    sums = disk.figures({"a": found, "b": {"skipped": "needs x"}}, 9.0, 2)
    assert (sums["operations"], sums["operations_struck"], sums["wrong"]) == (2, 1, 1)
    assert sums["struck"] == {"kill": 2, "EIO once": 1}
    lacks = Kind(lambda seeds, work: pytest.fail("made"), ("no_such_package_of_any_name",))
    assert "no_such_package_of_any_name" in lacks.missing()


# -- what it found ---------------------------------------------------------------------------------


def test_a_writer_that_dies_is_told_with_its_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(seeds: object, work: Path) -> Any:
        os.kill(os.getpid(), signal.SIGSEGV)

    def writes(place: Path) -> None:
        os.abort()

    kinds = {"dies": dies, "child": lambda seeds, work: Writer(writes, lambda place: "")}
    monkeypatch.setattr(disk, "WRITERS", {name: Kind(make, light=True) for name, make in kinds.items()})
    options = argparse.Namespace(jobs=1, minutes=1.0, kinds="kill", most=1, rerun=1, json=None)
    found = disk.campaign(list(kinds), tmp_path, options, time.monotonic())["writers"]
    assert found["dies"]["wrong"] == ["not struck: the writer died by signal 11"]
    (trace,) = found["dies"]["traces"]
    assert "Segmentation fault" in trace
    assert " in dies" in trace
    assert found["child"]["wrong"][0].startswith("not struck: the writer could not be made ready")
    assert " in writes" in found["child"]["traces"][0]


def killed_at(owner: Any, name: str, call: int, action: Callable[[], object]) -> None:
    """Let a fork do something, and be killed where it calls a function for this time."""
    pid = os.fork()
    if pid == 0:
        real, calls = getattr(owner, name), [0]

        def counted(*given: Any, **named: Any) -> Any:
            calls[0] += 1
            if calls[0] == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*given, **named)

        setattr(owner, name, counted)
        try:
            action()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The private key of a pair."""
    pytest.importorskip("cryptography")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    (tmp_path / "keys").mkdir()
    trust.new_keys(tmp_path / "keys" / "maker.pem")
    return tmp_path / "keys" / "maker.pem"


def test_a_killed_signing_leaves_the_artifact_whole(tmp_path: Path, keys: Path) -> None:
    make_artifact(tmp_path / "a")
    before = sorted(path.name for path in tmp_path.iterdir())
    killed_at(os, "fsync", 1, lambda: sign_artifact(tmp_path / "a", keys))
    verify(tmp_path / "a")
    sign_artifact(tmp_path / "a", keys)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_pair_of_keys_is_made_whole(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = keys.parent
    other, public = place / "other.pem", place / "other.pem.pub"

    def full(path: Path, *given: Any, **named: Any) -> None:
        if path == public:
            raise OSError(28, "No space left on device")
        files.new_file(path, *given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(trust, "new_file", full)
        with pytest.raises(ResourceError):
            trust.new_keys(other)
    assert sorted(path.name for path in place.iterdir()) == ["maker.pem", "maker.pem.pub"]
    killed_at(trust, "new_file", 2, lambda: trust.new_keys(other))
    private = other.read_bytes()
    assert trust.new_keys(other) == public  # the half that is missing
    assert other.read_bytes() == private
    assert trust._private_key(other).public_key().public_bytes_raw() == trust.read_public_key(public)
    with pytest.raises(InputError):
        trust.new_keys(other)
    assert other.read_bytes() == private


@pytest.mark.parametrize("can", [True, False])
def test_a_new_file_replaces_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can: bool) -> None:
    if not can:
        monkeypatch.setattr(files, "rename_with", lambda *given: False)
    path = tmp_path / "file"
    files.new_file(path, b"first", mode=0o600)
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        files.new_file(path, b"second")
    assert [item.name for item in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"first"


def test_what_killed_writers_of_a_file_left_goes_with_the_next(tmp_path: Path) -> None:
    killed_at(os, "fsync", 1, lambda: files.replace_file(tmp_path / "a", b"1"))
    killed_at(os, "fsync", 1, lambda: files.replace_file(tmp_path / "b", b"1"))
    assert len(list(tmp_path.iterdir())) == 2
    files.replace_file(tmp_path / "a", b"2")
    assert sorted(path.name == "a" for path in tmp_path.iterdir()) == [False, True]  # another file's stay
    files.replace_file(tmp_path / "b", b"2")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_run_that_was_killed_before_its_folder_was_made(tmp_path: Path) -> None:
    output = tmp_path / "runs" / "new" / "a"
    killed_at(os, "rmdir", 1, lambda: make_artifact(output))
    assert len(list(tmp_path.iterdir())) == 1
    make_artifact(output)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


def test_a_work_file_has_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for flag in (getattr(os, "O_TMPFILE", None), None):
        monkeypatch.setattr(os, "O_TMPFILE", flag, raising=False)
        if flag is None:
            killed_at(Path, "unlink", 1, lambda: files.nameless_file(tmp_path))
            assert len(list(tmp_path.iterdir())) == 1
        handle = files.nameless_file(tmp_path)
        os.write(handle, b"x")
        os.close(handle)
        assert list(tmp_path.iterdir()) == []


def test_files_of_a_plan_get_their_names_together(tmp_path: Path) -> None:
    names = [str(tmp_path / name) for name in ("model.plan", "engine.json", "manifest.json")]

    def build(fails: bool = False) -> None:
        with new_files(*names) as parts:
            for part in parts[:2]:  # without a manifest
                Path(part).write_text("new")
            if fails:
                raise OSError(28, "No space left on device")

    live = tmp_path / f"engine.json.tmp-{os.getppid()}"
    live.touch()
    killed_at(os, "fsync", 2, build)
    assert len(list(tmp_path.iterdir())) == 3
    with pytest.raises(OSError, match="No space"):
        build(fails=True)
    assert list(tmp_path.iterdir()) == [live]
    build()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engine.json", live.name, "model.plan"]


def test_a_compiler_without_space_is_not_unfit() -> None:
    command = ["sh", "-c", "echo 'as: error writing x.o: No space left on device' >&2; exit 1"]
    with pytest.raises(ResourceError, match="the disk is full while compiling C"):
        run_compiler(command, "the op library")
