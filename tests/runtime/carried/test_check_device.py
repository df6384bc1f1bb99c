"""optc check: a line per need, on machines that are made up."""

from __future__ import annotations

import ast
import ctypes
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from trt_graphs import description

from optc.cli.check import check as command
from optc.runtime.carried import check_device
from optc.runtime.carried.check_device import Machine, report, satisfies, text_of


@dataclass
class Fake:
    """A machine with what a test gives it."""

    cpu: set[str] = field(default_factory=set)
    packages: dict[str, str] = field(default_factory=dict)
    device: Any = "no NVIDIA driver: libcuda.so.1"
    kind: str = "x86_64"
    free: int | None = 8 << 30
    libc: str | None = "2.36"

    def flags(self) -> set[str]:
        return self.cpu

    def architecture(self) -> str:
        return self.kind

    def memory(self) -> int | None:
        return self.free

    def glibc(self) -> str | None:
        return self.libc

    def glibcxx(self) -> str | None:
        return "3.4.30"

    def package(self, name: str) -> str | None:
        return self.packages.get(name)

    def gpu(self) -> Any:
        return self.device


H200 = {"cuda": "13.0", "capability": 90, "free": 140 << 30}
RTX = {"cuda": "13.0", "capability": 89, "free": 24 << 30}


def folder(path: Path, needs: dict[str, Any], engine: dict[str, Any] | None = None, **manifest: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "manifest.json").write_text(json.dumps({"needs": needs, "weight_bytes": 1000, **manifest}))
    if engine is not None:
        (path / "engine.json").write_text(json.dumps(engine))
    return path


def lines(path: Path, machine: Fake) -> dict[str, tuple[bool | None, str]]:
    return {row["need"]: (row["ok"], row["found"]) for row in report(str(path), machine)["needs"]}


def test_a_package_of_native_code(tmp_path: Path) -> None:
    place = folder(tmp_path / "pt2", {"torch": "2.13", "cpu_flags": ["avx2", "avx512f"]}, engine=None)
    (place / "model.pt2").write_bytes(b"PK..GLIBC_2.34\0GLIBC_2.2.5\0GLIBCXX_3.4.32\0")
    found = lines(place, Fake(cpu={"avx2"}, packages={"torch": "2.13.0+cpu"}))
    assert found == {
        "torch 2.13": (True, "2.13.0+cpu"),
        "processor: avx2, avx512f": (False, "lacks avx512f"),
        "glibc >=2.34": (True, "2.36"),
        "libstdc++ with GLIBCXX >=3.4.32": (False, "3.4.30"),
        "memory: 0 MB": (True, "8590 MB free"),
    }


def test_an_onnx_folder(tmp_path: Path) -> None:
    needs = {"onnxruntime": ">=1.32.0", "x86_flags_any": ["avx512_vnni", "avx_vnni"]}
    place = folder(tmp_path / "onnx", needs, weight_bytes=10 << 30)
    vnni = "processor: one of avx512_vnni, avx_vnni"
    found = lines(place, Fake(cpu={"avx2"}, packages={"onnxruntime": "1.31.2"}))
    assert found["onnxruntime >=1.32.0"] == (False, "1.31.2")
    assert found[vnni] == (False, "lacks avx512_vnni, avx_vnni")
    assert found["memory: 13422 MB"] == (False, "8590 MB free")
    assert lines(place, Fake(cpu={"avx_vnni"}))[vnni] == (True, "all there")
    assert lines(place, Fake(kind="aarch64"))[vnni] == (True, "not needed on aarch64")
    assert lines(place, Fake(free=None))["memory: 13422 MB"] == (None, "cannot be read here")
    assert lines(place, Fake())["onnxruntime >=1.32.0"] == (False, "not installed")


def test_a_plan_for_rtx(tmp_path: Path) -> None:
    engine = description(
        plan="model.plan", runtime="tensorrt_rtx", runtime_version="1.7.1.28", compute_capabilities="portable"
    )
    needs = {"tensorrt_rtx": "==1.7.1.28", "compute_capabilities": ["portable"]}
    place = folder(tmp_path / "rtx", needs, engine)
    capability = "compute capability 8.0, 8.6, 8.9, 12.0, 12.1"
    packages = {"tensorrt_rtx": "1.7.1.28", "numpy": "1.26"}
    good = report(str(place), Fake(device=RTX, packages=packages))
    assert good["ok"]
    assert lines(place, Fake(device=H200, packages=packages))[capability] == (False, "9.0")
    bare = lines(place, Fake())
    assert bare[capability] == (False, "no NVIDIA driver: libcuda.so.1")
    assert bare["tensorrt_rtx ==1.7.1.28"] == (False, "not installed")
    assert bare["numpy"] == (False, "not installed")


def test_a_plan_that_a_device_built_is_known_from_engine_json_alone(tmp_path: Path) -> None:
    place = folder(tmp_path / "trt", {"tensorrt": ">=8.6"}, description())
    packages = {"tensorrt": "8.6.0", "numpy": "1.26.4"}
    assert lines(place, Fake(device=H200, packages=packages))["a plan"] == (
        False,
        "not built yet: run build_plan.py on this machine",
    )
    built = description(plan="model.plan", runtime="tensorrt", runtime_version="8.6.0", compute_capabilities=["sm90"])
    (place / "engine.json").write_text(json.dumps(built))
    assert report(str(place), Fake(device=H200, packages=packages))["ok"]
    assert lines(place, Fake(device=RTX, packages=packages))["compute capability 9.0"] == (False, "8.9")
    small = {**H200, "free": 100}
    assert lines(place, Fake(device=small, packages=packages))["GPU memory: 0 MB"] == (False, "0 MB free")


def test_either_tensorrt_serves_a_graph_of_fused_operators(tmp_path: Path) -> None:
    need = ">=10.15, or TensorRT for RTX"
    place = folder(tmp_path / "fused", {"tensorrt": need}, description())
    found = lines(place, Fake(device=RTX, packages={"tensorrt_rtx": "1.7.1"}))
    assert found[f"tensorrt {need}"] == (True, "tensorrt_rtx 1.7.1")


@pytest.mark.parametrize(
    ("version", "wanted", "fits"),
    [
        ("1.32.0", ">=1.32", True),
        ("1.4.0", ">=1.32", False),
        ("2.13.1+cpu", "2.13", True),
        ("2.1", "2.13", False),
        ("8.6.0", "==8.6.0", True),
        ("8.6.1", "==8.6.0", False),
        ("3.0", "any", True),
    ],
)
def test_versions(version: str, wanted: str, fits: bool) -> None:
    assert satisfies(version, wanted) is fits


def test_this_machine_answers() -> None:
    machine = Machine()
    assert machine.package("numpy") is not None
    assert machine.package("no-such-package") is None
    if sys.platform == "linux":
        assert machine.flags()
        assert machine.memory() > 1 << 20  # type: ignore[operator]
        assert machine.glibcxx().startswith("3.4.")  # type: ignore[union-attr]


def test_a_driver_that_answers_with_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    class Driver:
        @staticmethod
        def cuInit(flags: int) -> int:  # noqa: N802
            return 999

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    assert Machine().gpu() == "the driver finds no GPU that it can use (CUDA error 999)"


def test_the_script_alone(tmp_path: Path) -> None:
    """Outside of optc, isolated from its packages: exit 4 and the reason, or 7."""
    place = folder(tmp_path / "art", {"no-such-package": ">=1.0", "machine": "abacus"})
    script = Path(check_device.__file__)
    done = subprocess.run([sys.executable, "-I", script, place], capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert "NO  no-such-package >=1.0" in done.stdout
    assert "NO  machine abacus" in done.stdout
    done = subprocess.run([sys.executable, "-I", script, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 7
    assert "has neither manifest.json nor engine.json" in done.stderr


def test_the_command(tmp_path: Path) -> None:
    place = folder(tmp_path / "art", {"numpy": ">=1.0"})
    done = CliRunner().invoke(command, [str(place), "--json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["needs"][0]["ok"] is True
    folder(place, {"machine": "abacus"})
    assert CliRunner().invoke(command, [str(place)]).exit_code == 4


@pytest.mark.parametrize("text", ["[]", "{", '{"needs": [1]}', '{"needs": {"cpu_flags": 3}}'])
def test_what_is_no_artifact(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=r"manifest\.json"):
        report(str(tmp_path), Fake())


@pytest.mark.parametrize("value", ["1e999", "-1e999", "NaN", "1" + "0" * 400, "-1", "1.5", "true", "null", '"9"'])
def test_sizes_that_json_can_hold_and_no_machine(tmp_path: Path, value: str) -> None:
    engine: dict[str, Any] = {**description(), "runtime": None}
    for place, name in ((engine["cache"], name) for name in ("layers", "kv_heads", "head_dim", "capacity")):
        folder(tmp_path, {}, {**engine, "cache": {**place, name: 77}})
        path = tmp_path / "engine.json"
        path.write_text(path.read_text().replace(f'"{name}": 77', f'"{name}": {value}'))
        with pytest.raises(ValueError, match=f"{name} is no whole number"):
            report(str(tmp_path), Fake(device=RTX))
    (tmp_path / "engine.json").unlink()
    (tmp_path / "manifest.json").write_text(f'{{"needs": {{}}, "weight_bytes": {value}}}')
    with pytest.raises(ValueError, match="weight_bytes is no whole number"):
        report(str(tmp_path), Fake())


def test_the_text_and_the_grammar() -> None:
    rows = [{"need": "torch 2.13", "ok": True, "found": "2.13.0"}, {"need": "x", "ok": None, "found": "?"}]
    assert text_of({"needs": rows}) == "ok  torch 2.13  2.13.0\n?   x           ?"
    ast.parse(Path(check_device.__file__).read_text(), feature_version=(3, 8))
