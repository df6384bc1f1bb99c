"""Artifacts appear whole or not at all: after an exception, a full disk, SIGKILL at any moment."""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from artifacts import FILES, make_artifact, make_manifest

from optc.compiler.artifact import publishing
from optc.compiler.artifact.folder import check_output, finish, rewrite, verify, write_folder
from optc.compiler.artifact.manifest import Manifest
from optc.compiler.diagnostics import ArtifactError, InputError, OptcError, ResourceError
from optc.compiler.files import EXCHANGE, rename_with

KILLS = Path(__file__).parents[2] / "publishing_kill_driver.py"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# -- writing -------------------------------------------------------------------------------------


def test_written_artifact_verifies(tmp_path: Path) -> None:
    written = make_artifact(tmp_path / "out")
    assert verify(tmp_path / "out") == written
    assert {entry.path: entry.size for entry in written.files} == {path: len(data) for path, data in FILES.items()}
    assert [entry.path for entry in written.files] == sorted(FILES)
    assert names(tmp_path) == ["out"]


def test_missing_parents_are_made_and_unmade(tmp_path: Path) -> None:
    output = tmp_path / "a" / "b" / "out"
    with pytest.raises(RuntimeError, match=r"\['a'\]"), write_folder(output, force=False):
        raise RuntimeError(names(tmp_path))
    assert names(tmp_path) == []
    make_artifact(output)
    assert verify(output).target == "onnx-cpu"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("exists", [False, True])
def test_nothing_is_left_after_an_exception(tmp_path: Path, error: type[BaseException], exists: bool) -> None:
    if exists:
        make_artifact(tmp_path / "out", target="old")
    with pytest.raises(error), write_folder(tmp_path / "out", force=True) as directory:
        raise error((directory / "model.onnx").write_bytes(b"half"))
    assert names(tmp_path) == (["out"] if exists else [])
    assert not exists or verify(tmp_path / "out").target == "old"


@pytest.mark.parametrize("can_exchange", [True, False])
def test_force_replaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool) -> None:
    if not can_exchange:
        monkeypatch.setattr(publishing, "rename_with", lambda *given: False)
    make_artifact(tmp_path / "out", target="old")
    make_artifact(tmp_path / "out", force=True, target="new")
    assert verify(tmp_path / "out").target == "new"
    assert names(tmp_path) == ["out"]


def test_exchange_works_here(tmp_path: Path) -> None:
    """The path that the test above takes; it would hide a renameat2 that always says no."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "x").touch()
    if not rename_with(EXCHANGE, tmp_path / "a", tmp_path / "b"):
        pytest.skip("this kernel or filesystem has no RENAME_EXCHANGE")
    assert names(tmp_path / "b") == ["x"]
    assert names(tmp_path / "a") == []


def test_an_output_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the output exists"), write_folder(tmp_path / "out", force=False):
        make_artifact(tmp_path / "out", target="theirs")
    assert verify(tmp_path / "out").target == "theirs"
    assert names(tmp_path) == ["out"]


def test_finish_refuses_links(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").symlink_to("/etc/hostname")
    with pytest.raises(ArtifactError, match=r"'tokenizer\.json' is not a plain file"):
        finish(tmp_path, make_manifest())


# -- outputs that are refused --------------------------------------------------------------------


def _file(tmp_path: Path) -> tuple[Path, str]:
    (tmp_path / "out").write_text("x")
    return tmp_path / "out", "the output exists and is not a folder"


def _below_a_file(tmp_path: Path) -> tuple[Path, str]:
    (tmp_path / "file").write_text("x")
    return tmp_path / "file" / "deep" / "out", "failed while checking the output folder"


def _link(tmp_path: Path) -> tuple[Path, str]:
    make_artifact(tmp_path / "real")
    (tmp_path / "out").symlink_to("real")
    return tmp_path / "out", "the output is a symbolic link"


def _foreign(tmp_path: Path) -> tuple[Path, str]:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text('{"name": "a browser extension"}')
    return tmp_path / "out", "the output is a folder that optc did not write"


def _proc(tmp_path: Path) -> tuple[Path, str]:
    return Path("/proc/optc-output"), "failed while checking the output folder"


def _nameless(tmp_path: Path) -> tuple[Path, str]:
    return tmp_path / "..", "does not name a new folder"


@pytest.mark.parametrize("make", [_file, _below_a_file, _link, _foreign, _proc, _nameless])
@pytest.mark.parametrize("check", [lambda path: check_output(path, True), lambda path: make_artifact(path, force=True)])
def test_refused_even_with_force(tmp_path: Path, make, check) -> None:  # type: ignore[no-untyped-def]
    output, what = make(tmp_path)
    before = names(tmp_path)
    with pytest.raises(InputError) as caught:
        check(output)
    assert caught.value.exit_code == 3
    assert what in caught.value.what
    assert str(output) in str(caught.value)
    assert caught.value.remedy
    assert names(tmp_path) == before


@pytest.mark.parametrize("empty", [True, False])
def test_existing_output_needs_force(tmp_path: Path, empty: bool) -> None:
    if empty:
        (tmp_path / "out").mkdir()
    else:
        make_artifact(tmp_path / "out")
    with pytest.raises(InputError) as caught:
        check_output(tmp_path / "out", force=False)
    assert str(caught.value) == (
        f"the output exists\n  where: {tmp_path / 'out'}\n  remedy: choose another output, or replace it with --force"
    )
    check_output(tmp_path / "out", force=True)
    make_artifact(tmp_path / "out", force=True, target="new")
    assert verify(tmp_path / "out").target == "new"


def test_a_damaged_artifact_can_be_replaced(tmp_path: Path) -> None:
    make_artifact(tmp_path / "out")
    manifest = tmp_path / "out" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:500])
    make_artifact(tmp_path / "out", force=True)
    verify(tmp_path / "out")


# -- what killed runs leave ----------------------------------------------------------------------


@pytest.fixture
def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-S", "-c", ""])
    child.wait()
    return child.pid


def test_leftovers_of_dead_runs_are_removed(tmp_path: Path, dead_pid: int) -> None:
    stale = tmp_path / f".out.tmp-{dead_pid}-0123abcd"
    kept = [
        f".out.tmp-{os.getpid()}-0123abcd",  # a live run's
        f".other.tmp-{dead_pid}-0123abcd",  # of another output
        f".out.tmp-{dead_pid}-x",  # not a name that optc gives
    ]
    for folder in (stale, *(tmp_path / name for name in kept)):
        folder.mkdir()
        (folder / "model.onnx").write_bytes(b"half")
    make_artifact(tmp_path / "out")
    assert names(tmp_path) == sorted([*kept, "out"])


def test_a_locked_folder_is_kept_whatever_its_pid(tmp_path: Path, dead_pid: int) -> None:
    """In another container the pid of a live run is unknown."""
    folder = tmp_path / f".out.tmp-{dead_pid}-0123abcd"
    folder.mkdir()
    lock = publishing._hold(folder)
    make_artifact(tmp_path / "out")
    assert names(tmp_path) == [folder.name, "out"]
    os.close(lock)
    make_artifact(tmp_path / "out", force=True)
    assert names(tmp_path) == ["out"]


def test_the_old_artifact_of_a_crashed_swap_stays_until_a_new_one_stands(tmp_path: Path, dead_pid: int) -> None:
    old = tmp_path / f".out.old-{dead_pid}-0123abcd"
    make_artifact(tmp_path / "out", target="old")
    (tmp_path / "out").rename(old)
    with pytest.raises(RuntimeError), write_folder(tmp_path / "out", force=False):
        raise RuntimeError
    assert verify(old).target == "old"
    make_artifact(tmp_path / "out")
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize(("job", "can_exchange"), [("write", True), ("rewrite", True), ("write", False)])
def test_kill_at_every_step(tmp_path: Path, job: str, can_exchange: bool) -> None:
    """The old artifact whole, then the new one whole; in between only without exchange, absent. What `rewrite` wrote is
    published by the same steps as what `write_folder` wrote."""
    command = [sys.executable, KILLS, tmp_path / "out", job, "exchange" if can_exchange else "renames"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert len(seen) > 40
    expected = ["old", "new"] if can_exchange else ["old", "absent", "new"]
    assert [target for target, _ in itertools.groupby(seen)] == expected


def _writer(output: Path) -> int:
    """A forked process that writes an artifact again and again; its id."""
    child = os.fork()
    if child == 0:
        try:
            for count in itertools.count():
                make_artifact(output, force=True, target=str(count))
        finally:
            os._exit(1)
    return child


def test_kill_at_random_moments(tmp_path: Path) -> None:
    """At least ten kills, and until one came while a folder was written, however fast the machine is."""
    output, generator, partial = tmp_path / "out", random.Random(0), 0
    for count in range(1000):
        if count >= 10 and partial:
            break
        existed = output.exists()
        child = _writer(output)
        time.sleep(generator.uniform(0, 0.06))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert output.exists() or not existed
        if output.exists():
            verify(output)
        partial += names(tmp_path) != ["out"]
    assert partial, "no kill came while a folder was written: the test showed nothing"
    make_artifact(output, force=True)
    assert names(tmp_path) == ["out"]
    assert verify(output).target == "onnx-cpu"


# -- full disk -----------------------------------------------------------------------------------


def test_full_disk(tmp_path: Path) -> None:
    """A file-size limit stands for the full disk: the write fails in the kernel, in a real process."""
    make_artifact(tmp_path / "out", target="old")
    code = f"""
        import resource, signal, sys
        from pathlib import Path
        from optc.compiler.artifact.folder import write_folder
        from optc.compiler.diagnostics import ResourceError
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        try:
            with write_folder(Path({str(tmp_path / "out")!r}), force=True) as directory:
                (directory / "model.onnx").write_bytes(bytes(8192))
        except ResourceError as error:
            print(error)
            sys.exit(error.exit_code)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert run.returncode == 8, run.stderr
    assert "the disk is full while writing the artifact" in run.stdout
    assert f"where: {tmp_path / 'out'}" in run.stdout
    assert "remedy: free space and run again" in run.stdout
    assert names(tmp_path) == ["out"]
    assert verify(tmp_path / "out").target == "old"


@pytest.mark.parametrize("words", ["No space left on device (os error 28)", "File too large (os error 27)"])
def test_full_disk_in_the_words_of_an_engine(tmp_path: Path, words: str) -> None:
    with pytest.raises(ResourceError, match="the disk is full"), write_folder(tmp_path / "out", force=False):
        raise RuntimeError(f"Error while serializing: I/O error: {words}")
    assert names(tmp_path) == []


def test_optc_errors_pass_unchanged(tmp_path: Path) -> None:
    error = OptcError("No space left on device")
    with pytest.raises(OptcError) as caught, write_folder(tmp_path / "out", force=False):
        raise error
    assert caught.value is error


# -- rewriting -----------------------------------------------------------------------------------


def _edit(directory: Path, manifest: Manifest) -> Manifest:
    assert not (directory / "report.html").exists()
    (directory / "report.html").write_text("new")
    return msgspec.structs.replace(manifest, quality={"perplexity": 22.9})


def test_rewrite_shares_weights_and_replaces_the_report(tmp_path: Path) -> None:
    output = tmp_path / "out"
    make_artifact(output)
    inode = (output / "model.onnx.data").stat().st_ino
    for _ in range(2):
        written = rewrite(output, _edit)
        assert verify(output) == written
    assert written.quality == {"perplexity": 22.9}
    assert (output / "report.html").read_text() == "new"
    assert (output / "model.onnx.data").stat().st_ino == inode
    assert (output / "model.onnx.data").stat().st_nlink == 1
    assert names(tmp_path) == ["out"]


def test_rewrite_copies_where_links_are_impossible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, place: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    make_artifact(tmp_path / "out")
    monkeypatch.setattr(os, "link", refuse)
    rewrite(tmp_path / "out", _edit)
    assert verify(tmp_path / "out").quality == {"perplexity": 22.9}


def test_rewrite_through_a_link_to_the_artifact(tmp_path: Path) -> None:
    make_artifact(tmp_path / "out")
    (tmp_path / "latest").symlink_to("out")
    rewrite(tmp_path / "latest", _edit)
    assert verify(tmp_path / "latest").quality == {"perplexity": 22.9}
    assert names(tmp_path) == ["latest", "out"]


def test_rewrite_does_not_bless_damage(tmp_path: Path) -> None:
    make_artifact(tmp_path / "out")
    (tmp_path / "out" / "model.onnx").write_bytes(b"GRAPH" * 100)
    with pytest.raises(ArtifactError, match=r"'model\.onnx' was changed"):
        rewrite(tmp_path / "out", _edit)


def test_an_edit_that_writes_into_shared_files_is_a_bug(tmp_path: Path) -> None:
    def edit(directory: Path, manifest: Manifest) -> Manifest:
        (directory / "model.onnx").write_bytes(b"other")
        return manifest

    make_artifact(tmp_path / "out")
    with pytest.raises(AssertionError, match=r"an edit wrote into 'model\.onnx'"):
        rewrite(tmp_path / "out", edit)


def test_an_artifact_can_be_read_while_and_after_it_is_rewritten(tmp_path: Path) -> None:
    """Between the swap and the removal of the old folder the weights have two names, both ours."""

    def edit(directory: Path, manifest: Manifest) -> Manifest:
        assert (tmp_path / "out" / "model.onnx").stat().st_nlink == 2
        verify(tmp_path / "out")
        return manifest

    make_artifact(tmp_path / "out")
    rewrite(tmp_path / "out", edit)


@pytest.fixture(autouse=True)
def _no_open_files() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    assert len(os.listdir("/proc/self/fd")) <= before
