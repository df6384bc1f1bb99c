"""Errors that users see: what, where, why, what to do, and an exit code.

Exit codes: 0 done; 1 a bug of optc's; 2 usage; 3 bad input; 4 the target cannot do this;
5 a numerics gate failed; 6 a requested pass or pattern matched nothing; 7 the artifact is damaged or
untrusted; 8 out of memory or disk.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import ClassVar

import msgspec

_UNPRINTED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""Characters that move a terminal's cursor, change its colours or the order of letters, or are none in UTF-8."""


def printable(text: str) -> str:
    """Text of a file as a terminal may show it: control characters and lone surrogates become escapes, as \\x1b."""
    return _UNPRINTED.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class OptcError(Exception):
    """Base of all user-facing errors.

    Args:
        what: one sentence that says what went wrong.
        where: file, tensor, node or source line.
        why: the cause, when it is more than `what`.
        remedy: what the user can do.
    """

    exit_code: ClassVar[int] = 1
    kind: ClassVar[str] = "error"

    def __init__(
        self, what: str, *, where: str | None = None, why: str | None = None, remedy: str | None = None
    ) -> None:
        self.what, self.where, self.why, self.remedy = what, where, why, remedy
        super().__init__(str(self))

    def __str__(self) -> str:
        rows = [self.what]
        rows += [f"  where: {self.where}"] if self.where else []
        rows += [f"  cause: {self.why}"] if self.why else []
        rows += [f"  remedy: {self.remedy}"] if self.remedy else []
        return printable("\n".join(rows))

    def to_dict(self) -> dict[str, str | int | None]:
        """The error as the CLI's `--json` prints it."""
        return {
            "error": self.kind,
            "exit_code": self.exit_code,
            "what": self.what,
            "where": self.where,
            "cause": self.why,
            "remedy": self.remedy,
        }


class UsageError(OptcError):
    """An unknown name or a contradiction in the request."""

    exit_code = 2
    kind = "usage"


class InputError(OptcError):
    """A model, file, config or output folder that cannot be used."""

    exit_code = 3
    kind = "bad-input"


class CaptureError(InputError):
    """The model cannot be captured into a Program."""

    kind = "capture"


class TargetError(OptcError):
    """The target cannot do what was asked."""

    exit_code = 4
    kind = "target"


class GateError(OptcError):
    """A capture, a pass or a written file computes other numbers than it may."""

    exit_code = 5
    kind = "numerics-gate"


class NoMatchError(OptcError):
    """A requested pass, or a pattern of names, matched nothing."""

    exit_code = 6
    kind = "no-match"


class ArtifactError(OptcError):
    """The artifact is damaged, incomplete or not trusted."""

    exit_code = 7
    kind = "artifact"


class ResourceError(OptcError):
    """Out of memory or disk."""

    exit_code = 8
    kind = "resource"


class BusyError(ResourceError):
    """It would have to wait longer than is allowed; the same request may be served later."""

    kind = "busy"


class BugError(OptcError):
    """optc met what it does not expect: the mistake is its own."""

    kind = "bug"


_LONGEST_NAME = 100  # comparing takes the product of the lengths


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name closest to `name`, or None when none is close."""
    if len(name) > _LONGEST_NAME:
        return None
    found = difflib.get_close_matches(name.replace("_", "-"), list(known), n=1, cutoff=0.4)
    return found[0] if found else None


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """A UsageError for a name that is not in `known`, with the nearest one as the remedy."""
    names = sorted(known)
    name = name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}..."
    close = nearest(name, names)
    remedy = (f"did you mean '{close}'? " if close else "") + f"known: {', '.join(names)}"
    return UsageError(f"unknown {kind} '{name}'", remedy=remedy)


_NO_MEMORY = re.compile(r"failed to map segment from shared object$|[Cc]annot allocate memory")
"""What the loader of libraries (ld.so) says where memory is exhausted; where a disk forbids it, it says so behind that."""


def ran_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that memory is exhausted: Python's, or torch's on any device."""
    while error is not None:
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            return True
        if isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error):
            return True
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return True
        if isinstance(error, ImportError) and _NO_MEMORY.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
JSON_ERRORS = (msgspec.DecodeError, ValueError, RecursionError)
"""What `json` and msgspec raise on bytes that are no JSON, or none of the type: bad UTF-8, endless numbers and nesting."""
LEAVES = (KeyboardInterrupt, SystemExit, GeneratorExit)
"""What is raised to leave, not to tell of an error."""


def out_of_memory(action: str, where: str | None = None, why: str | None = None) -> ResourceError:
    """The error for exhausted memory."""
    return ResourceError(
        f"out of memory while {action}", where=where, why=why, remedy="use a smaller model or a larger machine"
    )


def described(error: BaseException) -> str:
    """Type and text of an exception of some library, in one line."""
    text = " ".join(str(error).split())
    text = text if len(text) <= 400 else f"{text[:400]}..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextmanager
def foreign_errors(
    what: str, *, where: str, remedy: str | None = None, kind: type[OptcError] = InputError
) -> Iterator[None]:
    """Around calls of other libraries on files: whatever they raise becomes a typed error that names the file.

    Their readers promise no exception types, and a panic of one in Rust is a BaseException. OptcErrors pass.

    Raises:
        ResourceError: memory is exhausted.
        OptcError: of `kind`, for anything else.
    """
    try:
        yield
    except (OptcError, *LEAVES):
        raise
    except BaseException as error:
        if ran_out_of_memory(error):
            raise out_of_memory("reading", where, described(error)) from error
        raise kind(what, where=where, why=described(error), remedy=remedy) from error


def os_failure(error: OSError, action: str, where: str | None = None) -> OptcError:
    """The typed error for what the system refused: 8 where disk or memory is exhausted, else 3."""
    where, why = where or (str(error.filename) if error.filename else None), str(error)
    if error.errno == errno.ENOMEM:
        return out_of_memory(action, where, why)
    if error.errno in _DISK_FULL:
        return ResourceError(
            f"the disk is full while {action}", where=where, why=why, remedy="free space and run again"
        )
    failed = "the disk or its connection has failed: check it, then run again"
    remedy = failed if error.errno == errno.EIO else "check the path and its permissions"
    return InputError(f"failed while {action}", where=where, why=why, remedy=remedy)


def says_disk_full(text: str) -> bool:
    """Whether a message, of a compiler or of an engine in Rust or C++, is that of a full disk."""
    return any(os.strerror(code) in text for code in _DISK_FULL)


@contextmanager
def os_errors(action: str, where: str) -> Iterator[None]:
    """Turn OSErrors of reading and writing into typed errors: 8 when disk or memory is exhausted, else 3."""
    try:
        yield
    except MemoryError as error:
        raise out_of_memory(action, where) from error
    except OSError as error:
        raise os_failure(error, action, where) from error
    except ValueError as error:
        if "null byte" not in str(error) and "surrogates not allowed" not in str(error):
            raise
        raise InputError(f"failed while {action}", where=where, why=str(error), remedy="give another path") from error
