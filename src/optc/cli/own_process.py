"""Engines on artifacts of others run in a process of their own: one that dies of a file is an error, and no crash.

ONNX Runtime, AOTInductor, TensorRT and ExecuTorch are native code and believe much of what their files say. What this
machine made went through them before it was published; of anything else the command is run in a fork.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from optc.compiler.diagnostics import ArtifactError, OptcError, ResourceError

_PR_SET_PDEATHSIG = 1
_CRASHES = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGTRAP, signal.SIGSYS}


def leave_to_own_process(artifacts: Sequence[Path]) -> None:
    """Return at once where all artifacts were made here; else only in a fork, whose end is that of this process.

    Call it before a library that starts threads is imported.

    Raises:
        ArtifactError: the fork crashed.
        ResourceError: it was killed.
        SystemExit: with the fork's exit code.
    """
    if all(map(_is_made_here, artifacts)) or not hasattr(os, "fork"):
        return
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
        _end_with(parent)
        return
    code = _waited(pid)
    if code >= 0:
        raise SystemExit(code)
    name = signal.Signals(-code).name
    where = ", ".join(map(str, artifacts))
    if -code in _CRASHES:
        raise ArtifactError(
            "the engine crashed on the artifact",
            where=where,
            why=f"its process was ended by {name}",
            remedy="the artifact is damaged or hostile: copy it again from where it was made, or do not use it",
        )
    raise ResourceError(
        "the engine's process was ended",
        where=where,
        why=f"by {name}",
        remedy="SIGKILL usually means that the system ran out of memory",
    )


def _is_made_here(artifact: Path) -> bool:
    """Whether this machine marked the manifest; what is wrong with an artifact is said by who opens it."""
    from optc.compiler.artifact.folder import read_manifest
    from optc.compiler.artifact.manifest import is_made_here

    try:
        return is_made_here(read_manifest(artifact))
    except OptcError:
        return True


def _end_with(parent: int) -> None:
    """Let the kernel end this process with its parent, however that ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def _waited(pid: int) -> int:
    """The exit code of a child, or minus its signal; SIGTERM and Ctrl-C reach it too."""
    while True:
        try:
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        except KeyboardInterrupt:
            continue  # the terminal sent it to the child as well, which ends in its own way
        except SystemExit:
            os.kill(pid, signal.SIGTERM)
            os.waitpid(pid, 0)
            raise
