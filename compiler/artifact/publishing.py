"""Publishing a folder: it appears whole under its name, or it does not appear.

The folder is written under a hidden name beside its own (`.NAME.tmp-PID-RANDOM`), synced to the disk
and renamed. What a killed run leaves under such a name is removed by the next run for the same output.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

from optc.compiler.artifact.manifest import FILE_NAME
from optc.compiler.diagnostics import InputError, OptcError, ResourceError, os_errors, os_failure, says_disk_full
from optc.compiler.files import EXCHANGE, rename_with, sync_file

_MARK = b'"optc_version"'
_OS_ERROR = re.compile(r"\(os error (\d{1,4})\)")  # as Rust says it
_LEFT = re.compile(r"\..+\.(?:tmp|old|gone)-(?P<pid>\d{1,7})-[0-9a-f]{8}")


def check_output(output: Path, force: bool) -> None:
    """Refuse an output that could not be published, before any work is spent on it.

    Raises:
        InputError: it exists and `force` is not given; it is a file, a link, or a folder that is
            neither empty nor an artifact (never replaced); or its place is not writable.
        ResourceError: the disk has no room for even a folder.
    """
    output = _absolute(output)
    with os_errors("checking the output folder", str(output)):
        if os.path.lexists(output):
            _check_existing(output, force)
        anchor = next(folder for folder in output.parents if folder.exists())
        probe = _sibling(anchor / output.name, "tmp")  # asking for permission misses read-only mounts and /proc
        _remove_abandoned(anchor / output.name, "tmp")  # of a run that was killed here, maybe above the output's folder
        probe.mkdir()
        probe.rmdir()


@contextlib.contextmanager
def write_folder(output: Path, *, force: bool) -> Iterator[Path]:
    """A temporary folder that becomes `output` when the block ends without an exception.

    Missing parents are made. After an exception, KeyboardInterrupt included, nothing is left.

    Raises:
        InputError: see `check_output`; also any other OSError of the block.
        ResourceError: out of disk or memory in the block.
    """
    output = _absolute(output)
    check_output(output, force)
    _remove_abandoned(output, "tmp|gone")
    temporary, parents, lock = _sibling(output, "tmp"), _missing_parents(output), -1
    try:
        with disk_errors(output):
            for folder in parents:
                folder.mkdir(exist_ok=True)
            temporary.mkdir()
            lock = _hold(temporary)
            yield temporary
            _sync_tree(temporary)
            _publish(temporary, output, force)
        _sync_names(output, parents)
    finally:
        # After an exchange this is the replaced artifact; after a plain rename there is nothing here.
        shutil.rmtree(temporary, ignore_errors=True)
        for folder in reversed(parents):
            with contextlib.suppress(OSError):  # not empty: it holds the output
                folder.rmdir()
        if lock >= 0:
            os.close(lock)
    _remove_abandoned(output, "old")


def remove_folder(folder: Path) -> None:
    """Remove a folder so that it is whole or gone: it is renamed first. What a kill leaves, the next run removes.

    Raises:
        InputError: it cannot be renamed.
    """
    aside = _sibling(folder, "gone")
    with os_errors("removing a folder", str(folder)):
        os.rename(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)  # what cannot be removed costs only space


def remove_abandoned(output: Path) -> None:
    """Remove what killed runs left beside an output.

    Raises:
        InputError: the folder cannot be read.
    """
    _remove_abandoned(_absolute(output), "tmp|gone")


def remove_abandoned_in(folder: Path) -> None:
    """Remove what killed runs left in a folder of their own, for outputs of any name.

    Raises:
        InputError: the folder cannot be read.
    """
    with os_errors("looking for interrupted runs", str(folder)):
        for path, pid in _named(folder, _LEFT).items():
            _remove_if_abandoned(path, pid)


def leftovers(output: Path, kind: str = "tmp|old|gone") -> dict[Path, int]:
    """Folders beside `output` that a run made for it -> the pid of that run."""
    pattern = rf"\.{re.escape(output.name)}\.(?:{kind})-(?P<pid>\d{{1,7}})-[0-9a-f]{{8}}"
    return _named(output.parent, re.compile(pattern))


def _absolute(output: Path) -> Path:
    """The output with its parents resolved; the last part stays, so that a link is seen as one."""
    if output.name in ("", ".."):
        raise InputError(f"'{output}' does not name a new folder", remedy="give a path such as out/model")
    with os_errors("looking up the output folder", str(output)):
        try:
            return output.parent.resolve() / output.name
        except RuntimeError as error:  # Python 3.11 and 3.12 say so of links in a circle
            raise InputError(
                "the output's folder is a circle of links", where=str(output.parent), remedy="choose another output"
            ) from error


def _missing_parents(output: Path) -> list[Path]:
    return [folder for folder in reversed(output.parents) if not folder.exists()]


def _sibling(output: Path, kind: str) -> Path:
    return output.with_name(f".{output.name}.{kind}-{os.getpid()}-{secrets.token_hex(4)}")


def _check_existing(output: Path, force: bool) -> None:
    where = str(output)
    if output.is_symlink():
        raise InputError("the output is a symbolic link", where=where, remedy="give the folder that it points to")
    if not output.is_dir():
        raise InputError("the output exists and is not a folder", where=where, remedy="choose another output")
    if not force:
        raise InputError("the output exists", where=where, remedy="choose another output, or replace it with --force")
    if any(output.iterdir()) and not _is_artifact(output):
        raise InputError(
            "the output is a folder that optc did not write",
            where=where,
            why=f"it has no {FILE_NAME} written by optc",
            remedy="choose another output; --force replaces only artifacts and empty folders",
        )


def _is_artifact(folder: Path) -> bool:
    """Whether the manifest looks like optc's; it may be damaged, replacing such an artifact is fine."""
    manifest = folder / FILE_NAME
    if not manifest.is_file():
        return False
    with manifest.open("rb") as file:
        return _MARK in file.read(4096)


@contextlib.contextmanager
def disk_errors(output: Path) -> Iterator[None]:
    """os_errors, and the failures of the disk that engines written in Rust or C++ report in words of their own."""
    try:
        with os_errors("writing the artifact", str(output)):
            yield
    except Exception as error:
        if isinstance(error, OptcError):
            raise
        number = _OS_ERROR.search(str(error))
        if number is not None:
            raise os_failure(OSError(int(number[1]), str(error)), "writing the artifact", str(output)) from error
        if not says_disk_full(str(error)):
            raise
        raise ResourceError(
            "the disk is full while writing the artifact",
            where=str(output),
            why=str(error),
            remedy="free space and run again",
        ) from error


# -- renaming ------------------------------------------------------------------------------------


def _publish(temporary: Path, output: Path, force: bool) -> None:
    if not os.path.lexists(output):
        os.rename(temporary, output)
        return
    _check_existing(output, force)  # again: it may have appeared while the block ran
    if rename_with(EXCHANGE, temporary, output):
        return
    # Two renames. A crash between them leaves nothing under the name, the old artifact whole beside
    # it as .NAME.old-*, and the new one whole as .NAME.tmp-*.
    aside = _sibling(output, "old")
    os.rename(output, aside)
    try:
        os.rename(temporary, output)
    except BaseException:
        os.rename(aside, output)
        raise
    shutil.rmtree(aside, ignore_errors=True)  # what cannot be removed costs only space


def _sync_tree(folder: Path) -> None:
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            _sync_tree(Path(entry.path))
        elif entry.is_file(follow_symlinks=False):
            sync_file(Path(entry.path))
    sync_file(folder)


def _sync_names(output: Path, parents: list[Path]) -> None:
    """Make the new names durable. The output stands already: that a power loss may undo it is no failure of the run."""
    try:
        for folder in (output, *parents):
            sync_file(folder.parent)
    except OSError as error:
        warnings.warn(
            f"{output} is written, but its name could not be synced to the disk ({error}): a power loss may undo it",
            RuntimeWarning,
            stacklevel=2,
        )


# -- what killed runs left -----------------------------------------------------------------------


def _hold(folder: Path) -> int:
    """Lock a folder for as long as this process lives; the kernel drops the lock with the process."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    with contextlib.suppress(OSError):  # a filesystem without locks: the pid alone tells
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return handle


def _named(parent: Path, pattern: re.Pattern[str]) -> dict[Path, int]:
    """Folders in `parent` whose names match -> the pid in the name."""
    found = {}
    for path in parent.iterdir() if parent.is_dir() else ():
        match = pattern.fullmatch(path.name)
        if match and path.is_dir() and not path.is_symlink():
            found[path] = int(match["pid"])
    return found


def _remove_abandoned(output: Path, kind: str) -> None:
    """Remove what killed runs left. The old artifact of a crashed swap stays until a new one stands."""
    with os_errors("looking for interrupted runs", str(output.parent)):
        for folder, pid in leftovers(output, kind).items():
            _remove_if_abandoned(folder, pid)


def _remove_if_abandoned(folder: Path, pid: int) -> None:
    with contextlib.suppress(FileNotFoundError):  # another run removed it just now
        if _is_dead(pid) and not _is_held(folder):
            shutil.rmtree(folder, ignore_errors=True)  # what cannot be removed costs only space


def _is_dead(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False  # somebody else's
    return False


def _is_held(folder: Path) -> bool:
    """Whether a live process holds the folder: pids mean nothing across containers, locks do."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # a filesystem without locks: the pid alone tells
    finally:
        os.close(handle)
    return False
