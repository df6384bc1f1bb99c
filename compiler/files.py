"""Plain files: reading one that a user or a folder names, hashes of one and of a folder, stamps, syncing."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import secrets
import stat
from pathlib import Path
from typing import NamedTuple

from optc.compiler.diagnostics import InputError, os_errors

MOST_BYTES = 8 << 30
"""Of a file that is read whole."""
_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
_PART = ".part-"


def read_plain(path: Path, action: str, *, most: int = MOST_BYTES, follow: bool = True) -> bytes:
    """The bytes of a plain file.

    A pipe or a device would block, or never end; asking its kind after it was opened leaves no time to put one there.

    Args:
        action: what goes on, as errors say it: "reading the recipe".
        follow: where it is a link, read what it points to.

    Raises:
        InputError: it is missing or unreadable, no plain file, or larger than `most`.
        ResourceError: out of memory.
    """
    where = str(path)
    with os_errors(action, where):
        handle = os.open(path, _FLAGS | (0 if follow else os.O_NOFOLLOW))
        with open(handle, "rb") as file:
            info = os.fstat(file.fileno())
            if not stat.S_ISREG(info.st_mode):
                kind = "a folder" if stat.S_ISDIR(info.st_mode) else "a pipe, socket or device"
                raise InputError(f"failed while {action}", where=where, why=f"it is {kind}", remedy="give a plain file")
            if info.st_size > most:
                why = f"it has {info.st_size} bytes, more than {most}"
                raise InputError(f"failed while {action}", where=where, why=why, remedy="give a smaller file")
            return file.read()


def replace_file(path: Path, data: bytes) -> None:
    """Write a file whole, synced: what was there before stays until all of the new one is on the disk.

    Raises:
        OSError: the disk refuses; nothing is left beside the old file.
    """
    part = path.with_name(f"{_PART}{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with part.open("xb") as file:
            with contextlib.suppress(OSError):  # a filesystem without locks: `remove_parts` leaves it alone
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def remove_parts(folder: Path) -> None:
    """Remove what killed writers of `replace_file` left in a folder; the kernel lets go of their locks.

    Raises:
        OSError: the folder cannot be read.
    """
    for part in folder.glob(f"{_PART}*"):
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
        OSError: a file cannot be read.
    """
    try:
        rows = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return f"it has no {SUMS}: it was not written whole, or by another version of optc"
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
