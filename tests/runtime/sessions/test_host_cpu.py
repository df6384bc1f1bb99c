"""Which processors may run an artifact of signed 8-bit weights."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from optc.compiler.diagnostics import TargetError
from optc.runtime.sessions.host_cpu import check_cpu

NEEDS = {"x86_flags_any": ["avx512_vnni", "avx_vnni"]}


def cpuinfo(folder: Path, flags: str) -> Path:
    path = folder / "cpuinfo"
    path.write_text(f"processor\t: 0\nflags\t\t: {flags}\n\nprocessor\t: 1\n")
    return path


def test_x86_without_vnni_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    with pytest.raises(TargetError, match=r"legalize-ort\.unsigned=true"):
        check_cpu(NEEDS, cpuinfo=cpuinfo(tmp_path, "fpu sse2 avx2"))
    check_cpu(NEEDS, cpuinfo=cpuinfo(tmp_path, "fpu avx2 avx_vnni"))
    check_cpu({"onnxruntime": ">=1"}, cpuinfo=cpuinfo(tmp_path, "fpu sse2 avx2"))
    check_cpu(NEEDS, cpuinfo=tmp_path / "absent")


def test_other_machines_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    check_cpu(NEEDS, cpuinfo=cpuinfo(tmp_path, "fpu sse2 avx2"))
