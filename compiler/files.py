"""Plain files: reading one that a user or a folder names, hashes of one and of a folder, stamps, syncing."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

from optc.compiler.diagnostics import InputError, os_errors

MOST_BYTES = 8 << 30
"""Of a file that is read whole."""
_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
_PART = ".part-"
KEEP, EXCHANGE = 1, 2
"""Flags of renameat2(2): refuse where the other name is taken; swap the two."""
_AT_FDCWD = -100


def read_plain(path: Path, action: str, *, most: int = MOST_BYTES, follow: bool = True) -> bytes:
    """The bytes of a plain file.

    Args:
        action, follow: as `open_plain`.

    Raises:
        InputError: as `open_plain`, or it is larger than `most`. ResourceError: out of memory.
    """
    with open_plain(path, action, follow=follow) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            why = f"it has {size} bytes, more than {most}"
            raise InputError(f"failed while {action}", where=str(path), why=why, remedy="give a smaller file")
        return file.read()


@contextlib.contextmanager
def open_plain(path: Path, action: str, *, follow: bool = True) -> Iterator[BinaryIO]:
    """A plain file, open for reading; what the system refuses in the block is told as of it.

    A pipe or a device would block, or never end; asking its kind after it was opened leaves no time to put one there.

    Args:
        action: what goes on, as errors say it: "reading the recipe".
        follow: where it is a link, read what it points to.

    Raises:
        InputError: it is missing or unreadable, or no plain file. ResourceError: out of memory.
    """
    where = str(path)
    with os_errors(action, where):
        handle = os.open(path, _FLAGS | (0 if follow else os.O_NOFOLLOW))
        with open(handle, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode):
                kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
                raise InputError(f"failed while {action}", where=where, why=f"it is {kind}", remedy="give a plain file")
            yield file


def replace_file(path: Path, data: bytes, *, place: Path | None = None) -> None:
    """Write a file whole, synced: what was there before stays until all of the new one is on the disk.

    What killed runs left of it is removed.

    Args:
        place: folder of the same filesystem where the file is written before it gets its name; None takes its own.

    Raises:
        OSError: the disk refuses; nothing is left beside the old file.
    """
    with _part(path, data, place or path.parent, 0o666) as part:
        part.replace(path)


def new_file(path: Path, data: bytes, *, mode: int = 0o666) -> None:
    """The same for a file that is not there yet.

    Args:
        mode: its permissions, less the umask.

    Raises:
        FileExistsError: it is there; it stays.
        OSError: the disk refuses; nothing is left.
    """
    with _part(path, data, path.parent, mode) as part:
        if not rename_with(KEEP, part, path):
            os.link(part, path)
            part.unlink()


def rename_with(flag: int, first: Path, second: Path) -> bool:
    """Rename in one step as a flag says (renameat2, Linux 3.15); False where kernel or filesystem cannot.

    Raises:
        OSError: it can, and refuses.
    """
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), flag) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(second))


def nameless_file(folder: Path) -> int:
    """The handle of a new file without a name in a folder: its space is free again when nobody holds it.

    Raises:
        OSError: it cannot be made.
    """
    flag = getattr(os, "O_TMPFILE", None)  # of Linux
    if flag is not None:
        with contextlib.suppress(OSError):  # a filesystem without it: what follows says what else is wrong
            return os.open(folder, flag | os.O_RDWR | os.O_CLOEXEC, 0o600)
    remove_parts(folder, f"{_PART}work-")
    part = folder / f"{_PART}work-{os.getpid()}-{secrets.token_hex(4)}"
    handle = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    part.unlink(missing_ok=True)
    return handle


@contextlib.contextmanager
def _part(path: Path, data: bytes, place: Path, mode: int) -> Iterator[Path]:
    """A synced file that gets another name in the block."""
    start = f"{_PART}{hashlib.sha256(path.name.encode()).hexdigest()[:8]}-"
    remove_parts(place, start)
    part = place / f"{start}{os.getpid()}-{secrets.token_hex(4)}"
    handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with open(handle, "wb") as file:
            with contextlib.suppress(OSError):  # a filesystem without locks: `remove_parts` leaves it alone
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            yield part
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def remove_parts(folder: Path, start: str = _PART) -> None:
    """Remove what killed writers of `replace_file` and `new_file` left in a folder; the kernel lets go of their locks.

    Args:
        start: of their names; as it is, those of all files.

    Raises:
        OSError: the folder cannot be read.
    """
    for part in folder.glob(f"{start}*"):
        with contextlib.suppress(OSError), part.open("rb") as file:  # held by a live writer, or gone just now
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()


class FileStamp(NamedTuple):
    """Device, number, size in bytes, and time of the last write in nanoseconds."""

    device: int
    inode: int
    size: int
    mtime_ns: int


def file_stamp(path: Path) -> FileStamp:
    """What tells a file from what it is after a write, and from another one in its place.

    Raises:
        OSError: it cannot be asked for.
    """
    found = path.stat()
    return FileStamp(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


def sync_file(path: Path) -> None:
    """Make the content of a file, or the names in a folder, durable; a link is refused.

    Raises:
        OSError: the disk refuses.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable.

    Raises:
        OSError: the disk refuses.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


SUMS = "SHA256SUMS"
_MOST_SUMS = 64 << 20  # bytes


def write_sums(folder: Path) -> None:
    """Write the hashes of a folder's files into it, as `sha256sum` would.

    Raises:
        OSError: a file cannot be read, or the sums cannot be written.
    """
    rows = [f"{sha256_of(folder / name)}  {name}\n" for name in _file_names(folder)]
    (folder / SUMS).write_text("".join(rows), encoding="utf-8")


def damage(folder: Path) -> str | None:
    """What is wrong with a folder that has its hashes in it (`write_sums`); None of a sound one.

    Raises:
        OSError: a file cannot be read. InputError: its list of hashes is large beyond measure.
    """
    if not (folder / SUMS).is_file():  # a pipe would block
        return f"it has no {SUMS}: it was not written whole, or by another version of optc"
    try:
        rows = read_plain(folder / SUMS, "reading checksums", most=_MOST_SUMS).decode().splitlines()
    except UnicodeDecodeError:
        return f"{SUMS} was changed"
    listed = {name: digest for digest, _, name in (row.partition("  ") for row in rows)}
    found = _file_names(folder)
    if sorted(listed) != found:
        return f"{sorted(listed.keys() ^ set(found))[0]!r} is not both in the folder and in {SUMS}"
    for name, digest in listed.items():
        if sha256_of(folder / name) != digest:
            return f"'{name}' was changed after it was written"
    return None


def _file_names(folder: Path) -> list[str]:
    """Of plain files, sorted; anything else than a folder counts as one, and cannot be read."""
    paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(name for name in (path.relative_to(folder).as_posix() for path in paths) if name != SUMS)


def sha256_of(path: Path) -> str:
    """sha256 of a file in hex; links are not followed.

    Raises:
        OSError: it cannot be read, or is a link.
    """
    handle = os.open(path, _FLAGS | os.O_NOFOLLOW)
    with open(handle, "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


LARGE_BYTES = 64 << 20
"""From here on reading files one after the other takes longer than threads cost."""
_THREADS = 4  # a disk, and the memory of a machine, have no more to give

_Item = TypeVar("_Item")
_Found = TypeVar("_Found")


def side_by_side(read: Callable[[_Item], _Found], items: Sequence[_Item], nbytes: int) -> list[_Found]:
    """`read` of each item, in order; several at a time where they have `LARGE_BYTES` together.

    What reads or hashes files leaves Python to other threads meanwhile. The first item whose `read` fails decides which
    error is raised.
    """
    threads = min(len(items), _THREADS, os.cpu_count() or 1)
    if threads < 2 or nbytes < LARGE_BYTES:
        return [read(item) for item in items]
    with ThreadPoolExecutor(threads, "optc-read") as pool:
        return list(pool.map(read, items))
