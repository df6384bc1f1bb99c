"""Errors that users see: what, where, why, what to do, and an exit code.

Exit codes: 0 done; 1 a bug of optc's; 2 usage; 3 bad input; 4 the target cannot do this;
5 a numerics gate failed; 6 a requested pass matched nothing; 7 the artifact is damaged or
untrusted; 8 out of memory or disk.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import ClassVar


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
        return "\n".join(rows)

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
    """A requested pass matched nothing."""

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


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name closest to `name`, or None when none is close."""
    found = difflib.get_close_matches(name.replace("_", "-"), list(known), n=1, cutoff=0.4)
    return found[0] if found else None


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """A UsageError for a name that is not in `known`, with the nearest one as the remedy."""
    names = sorted(known)
    close = nearest(name, names)
    remedy = (f"did you mean '{close}'? " if close else "") + f"known: {', '.join(names)}"
    return UsageError(f"unknown {kind} '{name}'", remedy=remedy)


def ran_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, says that memory is exhausted: Python's, or torch's on any device."""
    while error is not None:
        if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
            return True
        if isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


_DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def os_errors(action: str, where: str) -> Iterator[None]:
    """Turn OSErrors raised while writing into typed errors (8 when the disk is full, else 3)."""
    try:
        yield
    except MemoryError as error:
        raise ResourceError(
            f"out of memory while {action}", where=where, remedy="use a smaller model or a larger machine"
        ) from error
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise ResourceError(
                f"the disk is full while {action}",
                where=where,
                why=str(error),
                remedy="free space and run again",
            ) from error
        raise InputError(
            f"failed while {action}", where=where, why=str(error), remedy="choose a writable place"
        ) from error
