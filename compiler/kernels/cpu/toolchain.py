"""The C++ compiler, and the instruction set that packages are compiled for."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from optc.compiler import compat
from optc.compiler.diagnostics import ResourceError, TargetError, says_disk_full

_LEVEL_2 = ("cx16", "popcnt", "sse4_1", "sse4_2", "ssse3")
_LEVEL_3 = (*_LEVEL_2, "abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe")
_LEVEL_4 = (*_LEVEL_3, "avx512bw", "avx512cd", "avx512dq", "avx512f", "avx512vl")
_KERNEL_NAMES = {
    "avx512vnni": "avx512_vnni",
    "amx-tile": "amx_tile",
    "amx-bf16": "amx_bf16",
    "amx-int8": "amx_int8",
    "amx-fp16": "amx_fp16",
    "avx512bf16": "avx512_bf16",
}
"""Compiler flag -> name in /proc/cpuinfo, where they differ."""


@dataclass(frozen=True)
class InstructionSet:
    """What generated code may use.

    Attributes:
        march: for the compiler's `-march`; None leaves torch's choice, the build machine itself.
        flags: processor flags, as Linux names them, that a host must have.
    """

    march: str | None
    flags: tuple[str, ...]


def instruction_set() -> InstructionSet:
    """A level of x86-64 (psABI: v2, v3, v4) instead of all that this very processor can do.

    Packages then run on other machines of that level. Where torch has no setting for it (before 2.13),
    or on other processors, the host must have every flag of this one.
    """
    if platform.machine() != "x86_64" or not compat.has_inductor_march():
        return InstructionSet(None, tuple(sorted(host_flags())))
    used = [flag.removeprefix("-m") for flag in compat.vector_flags()]
    extra = {_KERNEL_NAMES.get(flag, flag) for flag in used}
    march: str
    level: tuple[str, ...]
    if "avx512f" in extra:
        march, level = "x86-64-v4", _LEVEL_4
    else:
        march, level = ("x86-64-v3", _LEVEL_3) if extra else ("x86-64-v2", _LEVEL_2)
    return InstructionSet(march, tuple(sorted(extra | set(level))))


def host_flags() -> set[str]:
    """Processor flags of this machine as Linux names them; empty elsewhere."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return set()
    lines = (line.partition(":") for line in path.read_text().splitlines())
    return next((set(value.split()) for key, _, value in lines if key.strip() in ("flags", "Features")), set())


def find_compiler() -> str:
    """The C++ compiler: `$CXX`, else the first of g++, clang++ and c++.

    Raises:
        TargetError: there is none.
    """
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise TargetError(
        "no C++ compiler was found",
        why="AOTInductor compiles its kernels with one, and so does the op library",
        remedy="install g++ 12 or newer (Debian and Ubuntu: apt install g++), or name one in $CXX",
    )


def run_compiler(command: list[str], what: str) -> str:
    """Run a compiler and return its output.

    Raises:
        TargetError: it failed; says what was compiled and its first error.
        ResourceError: the disk is full.
    """
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        check_space(result.stderr)
        lines = [line for line in result.stderr.splitlines() if "error" in line] or result.stderr.splitlines()
        raise TargetError(
            f"the C++ compiler failed on {what}",
            where=shlex.join(command)[:300],
            why=(lines or ["no output"])[0][:300],
            remedy="use g++ 12 or newer; name it in $CXX",
        )
    return result.stdout


def check_space(text: str) -> None:
    """Tell from a compiler's errors that it had no room, which is not its fault.

    Raises:
        ResourceError: the disk is full.
    """
    if says_disk_full(text):
        raise ResourceError(
            "the disk is full while compiling C++",
            why=next(line for line in text.splitlines() if says_disk_full(line)),
            remedy="free space where $TMPDIR and ~/.cache are, and run again",
        )
