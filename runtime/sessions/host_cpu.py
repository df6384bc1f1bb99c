"""What an artifact needs of the processor, checked before its engine computes with it."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optc.compiler.diagnostics import TargetError

_X86 = ("x86_64", "AMD64")


def check_cpu(needs: Mapping[str, Any], *, cpuinfo: Path = Path("/proc/cpuinfo")) -> None:
    """Refuse an x86 processor that has none of the flags in `needs["x86_flags_any"]`.

    Without them ONNX Runtime's product of unsigned and signed bytes saturates, silently. Where the flags cannot be
    read (other systems than Linux), nothing is refused.

    Raises:
        TargetError: the processor would compute wrong numbers.
    """
    wanted = needs.get("x86_flags_any")
    if not wanted or platform.machine() not in _X86 or not cpuinfo.is_file():
        return
    lines = (line.partition(":") for line in cpuinfo.read_text().splitlines())
    flags = next((set(value.split()) for key, _, value in lines if key.strip() == "flags"), set())
    if flags and flags.isdisjoint(wanted):
        raise TargetError(
            "this processor cannot multiply the artifact's 8-bit weights exactly",
            why=f"it has none of {', '.join(wanted)}, without which sums of products saturate",
            remedy="compile with --pass-option legalize-ort.unsigned=true",
        )
