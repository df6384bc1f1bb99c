"""Whether this machine can run an artifact of optc: one line per need, with ok or the reason.

This file needs Python 3.8 and nothing else. It travels inside artifacts as `check.py`, so it imports nothing else:

    python check.py [FOLDER] [--json]

It reads the folder's `manifest.json` (its `needs`) and `engine.json`, and looks at the processor, the C library, the
GPU, its driver and memory, and the installed packages. It loads no model and runs nothing of the artifact. Exit codes:
0 everything is there, 4 something is missing, 7 the folder is no artifact.
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":  # its own folder comes first: a file of an artifact would be taken for a module of Python's
    _HERE = os.path.dirname(os.path.realpath(__file__))
    sys.path[:] = [item for item in sys.path if os.path.realpath(item) != _HERE]

import argparse
import ctypes
import importlib.util
import json
import platform
import re
import shutil
from typing import Any, NamedTuple, Sequence

try:
    from importlib import metadata
except ImportError:  # pragma: no cover - Python 3.8 has it
    raise SystemExit("error: Python 3.8 or later is needed") from None

PORTABLE = (80, 86, 89, 120, 121)
"""Compute capabilities, times ten, that a portable plan of TensorRT for RTX runs on."""
_X86 = ("x86_64", "AMD64")
_DISTRIBUTIONS = {
    "tensorrt": ("tensorrt",),
    "tensorrt_rtx": ("tensorrt_rtx", "tensorrt_rtx_cu13", "tensorrt_rtx_cu12", "tensorrt_rtx_cu13_bindings"),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
}
_SPARE = 1.25
"""Memory that is asked for, over the size of weights and caches."""
_MOST = 1 << 62
_MOST_JSON = 32 << 20
"""Bytes of manifest.json: as objects of Python they take up to thirty times as many."""
_NATIVE = (".so", ".pt2")
_NATIVE_BYTES = 256 << 20


class Line(NamedTuple):
    """One need. `ok` is None where this machine does not say."""

    need: str
    ok: bool | None
    found: str


# -- the machine ------------------------------------------------------------------------------


class Machine:
    """What is asked of this machine; tests put another in its place."""

    def flags(self) -> set[str]:
        """Processor flags as Linux names them; empty where they cannot be read."""
        try:
            with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
                lines = [line.partition(":") for line in file]
        except OSError:
            return set()
        return next((set(value.split()) for key, _, value in lines if key.strip() in ("flags", "Features")), set())

    def architecture(self) -> str:
        return platform.machine()

    def memory(self) -> int | None:
        """Bytes of main memory that are free to use."""
        try:
            with open("/proc/meminfo", encoding="utf-8") as file:
                table = dict(line.split(":", 1) for line in file)
            return int(table["MemAvailable"].split()[0]) * 1024
        except (OSError, KeyError, ValueError):
            return None

    def glibc(self) -> str | None:
        """Version of the C library, or None where it is not glibc."""
        name, version = platform.libc_ver()
        return version if name == "glibc" else None

    def glibcxx(self) -> str | None:
        """The newest interface of libstdc++ ("3.4.30"), or None where the library is not found."""
        try:
            library = ctypes.CDLL("libstdc++.so.6")
            with open("/proc/self/maps", encoding="utf-8", errors="replace") as file:
                path = next((line.split()[-1] for line in file if "libstdc++.so.6" in line), None)
            del library
            if path is None:
                return None
            with open(path, "rb") as binary:
                names = re.findall(rb"GLIBCXX_(\d+(?:\.\d+)+)", binary.read())
        except OSError:
            return None
        parts = max((tuple(map(int, name.split(b"."))) for name in names), default=(0,))
        return ".".join(map(str, parts))

    def package(self, name: str) -> str | None:
        """Version of an installed Python package."""
        for item in _DISTRIBUTIONS.get(name, (name,)):
            try:
                return metadata.version(item)
            except metadata.PackageNotFoundError:  # noqa: PERF203 - a few names
                continue
        # A name with dots would import the packages that it is in; the names are data of the folder.
        found = name.isidentifier() and importlib.util.find_spec(name) is not None
        return "of unknown version" if found else None

    def gpu(self) -> dict[str, Any] | str:
        """Driver's CUDA version, compute capability times ten, and free memory; or why there is none."""
        try:
            cuda = ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
        except OSError as error:
            return f"no NVIDIA driver: {error}"
        code, count, device, context = cuda.cuInit(0), ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p()
        code = code or cuda.cuDeviceGetCount(ctypes.byref(count))
        if code or not count.value:
            return f"the driver finds no GPU that it can use (CUDA error {code})"
        version, parts = ctypes.c_int(), [ctypes.c_int(), ctypes.c_int()]
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        steps = [
            lambda: cuda.cuDriverGetVersion(ctypes.byref(version)),
            lambda: cuda.cuDeviceGet(ctypes.byref(device), 0),
            lambda: cuda.cuDeviceGetAttribute(ctypes.byref(parts[0]), 75, device),
            lambda: cuda.cuDeviceGetAttribute(ctypes.byref(parts[1]), 76, device),
            lambda: cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device),
            lambda: cuda.cuCtxSetCurrent(context),
            lambda: cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)),
        ]
        for step in steps:
            code = step()
            if code:
                return f"the driver answers with CUDA error {code}"
        cuda.cuDevicePrimaryCtxRelease_v2(device)
        return {
            "cuda": f"{version.value // 1000}.{version.value % 1000 // 10}",
            "capability": 10 * parts[0].value + parts[1].value,
            "free": free.value,
        }


# -- needs ------------------------------------------------------------------------------------


def check(folder: str, manifest: dict[str, Any], engine: dict[str, Any] | None, machine: Any) -> list[Line]:
    """A line for everything that the artifact needs."""
    lines: list[Line] = []
    needs = manifest.get("needs", {})
    gpu = machine.gpu() if _uses_gpu(manifest, engine) else None
    in_place = engine is not None and engine.get("runtime") in (None, "tensorrt")
    for name, wanted in needs.items():
        if name == "machine" and in_place:
            continue  # the machine that compiled; the plan is built on the one that runs it
        lines.append(_need(name, wanted, machine, gpu))
    lines += _native_lines(folder, machine)
    if engine is not None:
        lines += _plan_lines(engine, machine, gpu, set(needs))
    size = _count(manifest.get("weight_bytes", 0), "weight_bytes") + _cache_bytes(engine)
    if isinstance(gpu, dict):
        lines.append(_memory_line("GPU memory", size, gpu["free"]))
    elif gpu is None:
        lines.append(_memory_line("memory", size, machine.memory()))
    return lines


def _uses_gpu(manifest: dict[str, Any], engine: dict[str, Any] | None) -> bool:
    return engine is not None or manifest.get("device") == "cuda"


def _need(name: str, wanted: Any, machine: Any, gpu: Any) -> Line:
    if name == "cpu_flags":
        missing = sorted(set(wanted) - machine.flags())
        return _flags_line("processor: " + ", ".join(wanted), missing, machine)
    if name == "x86_flags_any":
        return _any_flag(list(wanted), machine)
    if name == "machine":
        found = machine.architecture()
        return Line(f"machine {wanted}", found == wanted, found)
    if name == "compute_capabilities":
        return _capability_line(wanted, gpu)
    if name == "cuda_driver":
        found = gpu["cuda"] if isinstance(gpu, dict) else gpu
        return Line(f"driver for CUDA {wanted}", isinstance(gpu, dict) and satisfies(str(found), wanted), str(found))
    version = machine.package(name)
    rtx = machine.package("tensorrt_rtx") if version is None and "TensorRT for RTX" in str(wanted) else None
    if rtx is not None:
        return Line(f"{name} {wanted}", True, f"tensorrt_rtx {rtx}")
    return Line(f"{name} {wanted}", version is not None and satisfies(version, wanted), version or "not installed")


def _flags_line(need: str, missing: list[str], machine: Any) -> Line:
    if not machine.flags():
        return Line(need, None, "the processor's flags cannot be read here")
    return Line(need, not missing, f"lacks {', '.join(missing)}" if missing else "all there")


def _any_flag(wanted: list[str], machine: Any) -> Line:
    """Only x86 processors need one of these: others multiply exactly."""
    need = f"processor: one of {', '.join(wanted)}"
    if machine.architecture() not in _X86:
        return Line(need, True, f"not needed on {machine.architecture()}")
    found = sorted(machine.flags().intersection(wanted))
    return _flags_line(need, [] if found else wanted, machine)


def _native_lines(folder: str, machine: Any) -> list[Line]:
    """The versions of glibc and libstdc++ that native code in the folder was linked against, packages included."""
    needed: dict[str, tuple[int, ...]] = {}
    for name in sorted(os.listdir(folder)):
        path = os.path.join(folder, name)
        if os.path.isfile(path) and 4 <= os.path.getsize(path) <= _NATIVE_BYTES:
            with open(path, "rb") as file:
                native = name.endswith(_NATIVE) or file.read(4) == b"\x7fELF"
                file.seek(0)
                data = file.read() if native else b""
            for family, version in re.findall(rb"\b(GLIBC|GLIBCXX)_(\d+(?:\.\d+)+)\b", data):
                parts = tuple(map(int, version.decode().split(".")))
                needed[family.decode()] = max(needed.get(family.decode(), ()), parts)
    lines = []
    for family, have in (("GLIBC", machine.glibc), ("GLIBCXX", machine.glibcxx)):
        if family in needed:
            wanted, found = ".".join(map(str, needed[family])), have()
            title = "glibc" if family == "GLIBC" else "libstdc++ with GLIBCXX"
            ok = None if found is None else satisfies(found, f">={wanted}")
            lines.append(Line(f"{title} >={wanted}", ok, found or "cannot be read here"))
    return lines


def _capability_line(wanted: Any, gpu: Any) -> Line:
    portable = wanted in ("portable", ["portable"])
    known = list(PORTABLE) if portable else [int(re.sub(r"\D", "", str(item))) for item in wanted]
    need = "compute capability " + ", ".join(f"{item // 10}.{item % 10}" for item in known)
    if not isinstance(gpu, dict):
        return Line(need, False, str(gpu))
    found = gpu["capability"]
    return Line(need, found in known, f"{found // 10}.{found % 10}")


def _plan_lines(engine: dict[str, Any], machine: Any, gpu: Any, named: set[str]) -> list[Line]:
    """What engine.json says beyond the manifest; a plan built later, on a device, is noted only there."""
    lines = []
    if "compute_capabilities" not in named and engine.get("compute_capabilities"):
        lines.append(_capability_line(engine["compute_capabilities"], gpu))
    if not isinstance(gpu, dict):
        lines.append(Line("NVIDIA GPU and driver", False, str(gpu)))
    else:
        lines.append(Line("NVIDIA GPU and driver", True, f"driver for CUDA {gpu['cuda']}"))
    runtime, version = engine.get("runtime"), engine.get("runtime_version")
    if engine.get("plan") is None:
        lines.append(Line("a plan", False, "not built yet: run build_plan.py on this machine"))
    elif runtime and runtime not in named:
        found = machine.package(runtime)
        fits = found is not None and satisfies(found, f"=={version}")
        lines.append(Line(f"{runtime} =={version}", fits, found or "not installed"))
    found = machine.package("numpy")
    lines.append(Line("numpy", found is not None, found or "not installed"))
    return lines


def _cache_bytes(engine: dict[str, Any] | None) -> int:
    """KV cache of one row, twice where the graph reads one set and writes another."""
    if engine is None:
        return 0
    cache = engine["cache"]
    width = 4 if cache["dtype"] == "float32" else 2
    sets = 2 if cache["update"] == "ping_pong" else 1
    layers, heads, size, capacity = (_count(cache[key], key) for key in ("layers", "kv_heads", "head_dim", "capacity"))
    return 2 * sets * layers * heads * size * capacity * width


def _count(value: Any, name: str) -> int:
    """A count as JSON has it: Python reads 1e999 as infinity there, and a number of 400 digits as it is."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MOST:
        raise ValueError(f"{name} is no whole number from 0 to 2^62")
    return value


def _memory_line(name: str, size: int, free: int | None) -> Line:
    wanted = int(size * _SPARE)
    need = f"{name}: {wanted / 1e6:.0f} MB"
    if free is None:
        return Line(need, None, "cannot be read here")
    return Line(need, free >= wanted, f"{free / 1e6:.0f} MB free")


def satisfies(version: str, wanted: Any) -> bool:
    """Whether a version fits ">=1.2", "==1.2.3" or "1.2" (a prefix); other text asks only that it is installed."""
    match = re.match(r"(>=|==)?\s*(\d+(?:\.\d+)*)", str(wanted))
    have = [int(item) for item in re.findall(r"\d+", version.split("+")[0])]
    if match is None:
        return True
    want = [int(item) for item in match.group(2).split(".")]
    if match.group(1) == ">=":
        return have[: len(want)] >= want
    return have[: len(want)] == want


# -- command line -------------------------------------------------------------------------------


def read(folder: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """manifest.json and, where there is one, engine.json.

    Raises:
        ValueError: the folder is no artifact.
    """
    found: list[Any] = []
    for name in ("manifest.json", "engine.json"):
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            found.append(None)
            continue
        try:
            if os.path.getsize(path) > _MOST_JSON:
                raise ValueError(f"it has {os.path.getsize(path)} bytes, more than {_MOST_JSON}")
            with open(path, encoding="utf-8") as file:
                found.append(json.load(file))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        if not isinstance(found[-1], dict):
            raise ValueError(f"{path} is not a JSON object")
    if found == [None, None]:
        raise ValueError(f"{folder} has neither manifest.json nor engine.json")
    return found[0] or {}, found[1]


def report(folder: str, machine: Any = None) -> dict[str, Any]:
    """The lines of a folder, and whether all is there.

    Raises:
        ValueError: the folder is no artifact.
    """
    manifest, engine = read(folder)
    try:
        lines = check(folder, manifest, engine, machine or Machine())
    except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{folder}: a field of manifest.json or engine.json is not as optc writes it: {error}"
        ) from error
    rows = [{"need": line.need, "ok": line.ok, "found": line.found} for line in lines]
    return {"artifact": folder, "ok": all(line.ok is not False for line in lines), "needs": rows}


def text_of(result: dict[str, Any]) -> str:
    """One line per need: ok, no or ?, the need, and what was found."""
    width = max((len(row["need"]) for row in result["needs"]), default=0)
    marks = {True: "ok", False: "NO", None: "? "}
    width = min(width, max(20, shutil.get_terminal_size().columns - 40))
    return "\n".join(f"{marks[row['ok']]}  {row['need']:{width}}  {row['found']}" for row in result["needs"])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; its exit code."""
    parser = argparse.ArgumentParser(description="Say whether this machine can run an artifact.")
    parser.add_argument("folder", nargs="?", default=os.path.dirname(os.path.abspath(__file__)))
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    try:
        result = report(options.folder)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 7
    print(json.dumps(result) if options.json else text_of(result))
    return 0 if result["ok"] else 4


if __name__ == "__main__":
    sys.exit(main())
