"""The steps of publishing one by one: exact refusals, calls that fail, filesystems that lack something."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from artifacts import make_artifact

from optc.compiler.artifact import publishing
from optc.compiler.artifact.folder import check_output, verify, write_folder
from optc.compiler.diagnostics import InputError
from optc.compiler.files import EXCHANGE, rename_with


def refused(output: Path) -> str:
    with pytest.raises(InputError) as caught:
        check_output(output, force=True)
    return str(caught.value)


def fails_with(code: int) -> Callable[..., Any]:
    """A function that fails as a system call does."""

    def fail(*_: object, **__: object) -> Any:
        raise OSError(code, os.strerror(code))

    return fail


# -- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", [Path("/"), Path(), Path("x/..")])
def test_an_output_without_a_name(output: Path) -> None:
    assert refused(output) == f"'{output}' does not name a new folder\n  remedy: give a path such as out/model"


def test_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    assert refused(tmp_path / "out") == (
        f"the output is a symbolic link\n  where: {tmp_path / 'out'}\n  remedy: give the folder that it points to"
    )


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    assert refused(tmp_path / "out") == (
        f"the output exists and is not a folder\n  where: {tmp_path / 'out'}\n  remedy: choose another output"
    )


def _foreign(output: Path) -> str:
    return (
        f"the output is a folder that optc did not write\n  where: {output}\n"
        "  cause: it has no manifest.json written by optc\n"
        "  remedy: choose another output; --force replaces only artifacts and empty folders"
    )


def test_a_folder_of_somebody_elses(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    assert refused(tmp_path / "out") == _foreign(tmp_path / "out")


@pytest.mark.parametrize("end", [4096, 4097])
def test_the_mark_of_optc_stands_at_the_beginning(tmp_path: Path, end: int) -> None:
    """Of a manifest, which may be damaged, the first 4096 bytes are read."""
    output, mark = tmp_path / "out", b'"optc_version"'
    output.mkdir()
    (output / "manifest.json").write_bytes(b" " * (end - len(mark)) + mark)
    if end == 4096:
        check_output(output, force=True)
    else:
        assert refused(output) == _foreign(output)


@pytest.mark.parametrize(
    ("owner", "name", "doing", "place"),
    [
        (Path, "resolve", "looking up the output folder", "out"),
        (publishing, "_sibling", "checking the output folder", "out"),
        (publishing, "leftovers", "looking for interrupted runs", "."),
    ],
)
def test_a_disk_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, doing: str, place: str
) -> None:
    monkeypatch.setattr(owner, name, fails_with(errno.EIO))
    with pytest.raises(InputError) as caught, write_folder(tmp_path / "out", force=False):
        pass
    assert (caught.value.what, caught.value.where) == (f"failed while {doing}", str(tmp_path / place))


# -- swapping ------------------------------------------------------------------------------------


def _folders(folder: Path) -> tuple[Path, Path]:
    first, second = folder / "a", folder / "b"
    for path in (first, second):
        path.mkdir()
        (path / path.name).touch()
    return first, second


def test_paths_that_are_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = _folders(tmp_path)
    if not rename_with(EXCHANGE, first, second):
        pytest.skip("this kernel or filesystem has no RENAME_EXCHANGE")
    assert (first / "b").exists()
    monkeypatch.chdir(tmp_path)
    assert rename_with(EXCHANGE, Path("a"), Path("b"))
    assert (first / "a").exists()
    assert (second / "b").exists()


def test_a_swap_that_fails_says_what_the_kernel_said(tmp_path: Path) -> None:
    first, _ = _folders(tmp_path)
    with pytest.raises(FileNotFoundError) as caught:
        rename_with(EXCHANGE, first, tmp_path / "none")
    assert (caught.value.errno, caught.value.strerror) == (errno.ENOENT, os.strerror(errno.ENOENT))
    assert caught.value.filename == str(tmp_path / "none")


@pytest.mark.parametrize("code", [None, errno.ENOSYS, errno.EINVAL, errno.ENOTSUP])
def test_where_nothing_can_be_swapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int | None) -> None:
    """A C library without the call, a kernel or a filesystem that does not know it: two renames do it."""

    class Library:
        def __init__(self, *_: object, **__: object) -> None:
            if code is not None:
                self.renameat2 = self._fail

        def _fail(self, *_: object) -> int:
            ctypes.set_errno(code or 0)
            return -1

    monkeypatch.setattr(ctypes, "CDLL", Library)
    assert rename_with(EXCHANGE, *_folders(tmp_path)) is False
    make_artifact(tmp_path / "out", target="old")
    make_artifact(tmp_path / "out", force=True, target="new")
    assert verify(tmp_path / "out").target == "new"


def test_two_renames_of_which_the_second_fails_put_the_old_artifact_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, rename = tmp_path / "out", os.rename
    make_artifact(output, target="old")

    def fail(error: BaseException) -> None:
        def second_fails(source: Path, place: Path) -> None:
            if ".tmp-" in source.name and place == output:
                assert not output.exists(), "this is not the second rename"
                raise error
            rename(source, place)

        monkeypatch.setattr(os, "rename", second_fails)

    monkeypatch.setattr(publishing, "rename_with", lambda *_: False)
    fail(OSError(errno.EIO, "the disk failed"))
    with pytest.raises(InputError, match="the disk failed"):
        make_artifact(output, force=True, target="new")
    assert (os.listdir(tmp_path), verify(output).target) == (["out"], "old")
    fail(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        make_artifact(output, force=True, target="new")
    assert (os.listdir(tmp_path), verify(output).target) == (["out"], "old")


def _stays(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """Folders with this in their names cannot be removed."""
    remove = publishing.shutil.rmtree

    def refuse(path: Path, ignore_errors: bool = False) -> None:
        if part not in path.name:
            remove(path, ignore_errors=ignore_errors)
        elif not ignore_errors:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(publishing.shutil, "rmtree", refuse)


def test_an_old_artifact_that_cannot_be_removed_costs_only_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    make_artifact(output, target="old")
    monkeypatch.setattr(publishing, "rename_with", lambda *_: False)
    _stays(monkeypatch, ".old-")
    make_artifact(output, force=True, target="new")
    ((old, pid),) = publishing.leftovers(output).items()
    assert (verify(output).target, verify(old).target, pid) == ("new", "old", os.getpid())


# -- syncing -------------------------------------------------------------------------------------


def test_links_are_not_followed(tmp_path: Path) -> None:
    """Neither to files nor to folders, of which one here is without end."""
    (tmp_path / "file").touch()
    for name, place in (("to_file", "file"), ("to_folder", "."), ("to_nothing", "none")):
        (tmp_path / name).symlink_to(place)
    publishing._sync_tree(tmp_path)
    with pytest.raises(OSError, match="symbolic links") as caught:
        publishing.sync_file(tmp_path / "to_file")
    assert caught.value.errno == errno.ELOOP


def test_every_file_and_folder_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "file").touch()
    seen = []
    monkeypatch.setattr(publishing, "sync_file", seen.append)
    publishing._sync_tree(tmp_path)
    assert seen == [tmp_path / "deep" / "file", tmp_path / "deep", tmp_path]


def test_an_artifact_whose_name_cannot_be_synced_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output, sync, failed = tmp_path / "new" / "out", publishing.sync_file, []

    def fail(path: Path) -> None:
        if path == tmp_path:
            failed.append(path)
            raise OSError(errno.EIO, "the disk failed")
        sync(path)

    monkeypatch.setattr(publishing, "sync_file", fail)
    with pytest.warns(RuntimeWarning) as caught:
        make_artifact(output)
    assert [str(warning.message) for warning in caught] == [
        f"{output} is written, but its name could not be synced to the disk ([Errno {errno.EIO}] the disk failed): "
        "a power loss may undo it"
    ]
    assert (verify(output).target, failed) == ("onnx-cpu", [tmp_path])


# -- what killed runs left -----------------------------------------------------------------------


def test_only_folders_are_held(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for function in (publishing._hold, publishing._is_held):
        with pytest.raises(NotADirectoryError):
            function(tmp_path / "file")


def test_a_filesystem_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pid alone tells."""
    monkeypatch.setattr(fcntl, "flock", fails_with(errno.ENOLCK))
    os.close(publishing._hold(tmp_path))
    assert publishing._is_held(tmp_path) is False


def test_a_run_of_another_user_is_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "kill", fails_with(errno.EPERM))
    assert publishing._is_dead(1) is False


def test_looking_at_a_run_does_not_disturb_it() -> None:
    code = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL); print(flush=True); input()"  # under nohup too
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-S", "-c", code], **pipes) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdout.readline()
        assert publishing._is_dead(child.pid) is False
        child.stdin.write(b"\n")
        child.stdin.close()
        assert child.wait() == 0
    assert publishing._is_dead(child.pid) is True


def _abandoned(folder: Path) -> Path:
    child = subprocess.Popen([sys.executable, "-S", "-c", ""])
    child.wait()
    path = folder / f".out.tmp-{child.pid}-0123abcd"
    path.mkdir()
    return path


def test_two_runs_clean_up_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _abandoned(tmp_path)
    monkeypatch.setattr(publishing, "_is_held", fails_with(errno.ENOENT))
    make_artifact(tmp_path / "out")
    verify(tmp_path / "out")


def test_what_cannot_be_removed_costs_only_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = _abandoned(tmp_path)
    _stays(monkeypatch, kept.name)
    make_artifact(tmp_path / "out")
    verify(tmp_path / "out")
    assert kept.exists()


_DEAD = 4194304 + 7  # beyond the largest pid that Linux gives


def _left_by_runs(folder: Path) -> dict[str, Path]:
    """What killed runs of two outputs left in a folder, what a living one has, and what only looks like it."""
    names = {
        "dead": f".out.tmp-{_DEAD}-0a1b2c3d",
        "gone": f".out.gone-{_DEAD}-0a1b2c3d",
        "old": f".out.old-{_DEAD}-0a1b2c3d",
        "other": f".other.tmp-{_DEAD}-0a1b2c3d",
        "alive": f".out.tmp-{os.getpid()}-0a1b2c3d",
        "foreign": f".out.tmp-{_DEAD}-0a1b2c3",
        "plain": "out",
    }
    for name in names.values():
        (folder / name / "inner").mkdir(parents=True)
    return {key: folder / name for key, name in names.items()}


def _there(found: dict[str, Path]) -> set[str]:
    return {key for key, path in found.items() if path.exists()}


def test_what_killed_runs_left_beside_an_output_is_removed(tmp_path: Path) -> None:
    found = _left_by_runs(tmp_path)
    publishing.remove_abandoned(tmp_path / "out")
    assert _there(found) == {"old", "other", "alive", "foreign", "plain"}, "the old artifact of a swap stays"


def test_checking_an_output_removes_what_checks_of_killed_runs_left(tmp_path: Path) -> None:
    """It stands above folders that are not there yet; nothing else that is there has been made by a check."""
    found = _left_by_runs(tmp_path)
    check_output(tmp_path / "new" / "deep" / "out", force=False)
    assert _there(found) == set(found) - {"dead"}
    assert not (tmp_path / "new").exists()


def test_a_check_that_fails_leaves_what_the_next_one_removes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rmdir", fails_with(errno.EIO))
        with pytest.raises(InputError):
            check_output(tmp_path / "out", force=False)
    (name,) = os.listdir(tmp_path)
    assert publishing.leftovers(tmp_path / "out", "tmp") == {tmp_path / name: os.getpid()}


def test_a_folder_of_runs_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "iterdir", fails_with(errno.EIO))
    with pytest.raises(InputError) as caught:
        publishing.remove_abandoned_in(tmp_path)
    assert (caught.value.what, caught.value.where) == ("failed while looking for interrupted runs", str(tmp_path))


def test_what_killed_runs_left_in_a_folder_of_their_own_is_removed(tmp_path: Path) -> None:
    found = _left_by_runs(tmp_path)
    link, file = tmp_path / f".l.tmp-{_DEAD}-0a1b2c3d", tmp_path / f".f.tmp-{_DEAD}-0a1b2c3d"
    link.symlink_to(found["plain"])
    file.touch()
    publishing.remove_abandoned_in(tmp_path)
    assert _there(found) & {"dead", "gone", "other"} == set()
    assert _there(found) >= {"alive", "foreign", "plain"}
    assert (link.is_symlink(), file.exists()) == (True, True)
    publishing.remove_abandoned_in(tmp_path / "none")


def test_a_folder_is_whole_or_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is renamed before its files are removed; what cannot be removed then is left for the next run."""
    folder, seen = tmp_path / "out", []
    (folder / "inner").mkdir(parents=True)

    def rmtree(path: Path, ignore_errors: bool = False) -> None:
        seen.append((path, ignore_errors, folder.exists()))

    monkeypatch.setattr(publishing.shutil, "rmtree", rmtree)
    publishing.remove_folder(folder)
    ((aside, ignored, still),) = seen
    assert (ignored, still) == (True, False)
    assert publishing.leftovers(folder, "gone") == {aside: os.getpid()}
    monkeypatch.setattr(os, "rename", fails_with(errno.EIO))
    with pytest.raises(InputError) as caught:
        publishing.remove_folder(folder)
    assert (caught.value.what, caught.value.where) == ("failed while removing a folder", str(folder))


@pytest.mark.parametrize("name", ["", "..", "a/.."])
def test_an_output_has_a_name(name: str) -> None:
    with pytest.raises(InputError) as caught:
        check_output(Path(name), force=False)
    assert caught.value.what == f"'{Path(name)}' does not name a new folder"
    assert caught.value.remedy == "give a path such as out/model"


def test_an_output_in_a_circle_of_links(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(InputError) as caught:
        check_output(tmp_path / "a" / "out", force=False)
    assert caught.value.where == str(tmp_path / "a")
    if sys.version_info < (3, 13):
        assert caught.value.what == "the output's folder is a circle of links"
        assert caught.value.remedy == "choose another output"
