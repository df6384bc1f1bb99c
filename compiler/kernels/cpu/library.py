"""The C++ op library: built once per source, compiler and torch, and kept in the user's cache."""

from __future__ import annotations

import hashlib
import os
import platform
import tempfile
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path

import torch

from optc.compiler.diagnostics import os_errors
from optc.compiler.kernels.cpu.toolchain import find_compiler, run_compiler

FILE_NAME = "liboptc_ops.so"
_SOURCES = ("tile.h", "tile.cpp", "paged_attention.cpp", "nbits.h", "nbits.cpp", "linear_nbits.cpp")
_OPS = ("paged_attention", "linear_nbits")
_INSTRUCTION_SETS: dict[str, list[str]] = {
    "baseline": [],
    "avx2": ["-march=x86-64-v3"],
    "avx512": ["-march=x86-64-v4", "-mavx512vnni"],
}
_LOOPS = (
    ("tile", "OPTC_TILE", "-O3", ("baseline", "avx2")),
    ("nbits", "OPTC_NBITS", "-O2", ("baseline", "avx2", "avx512")),  # unrolled by hand: -O3 is no faster
)
"""Source, the macro that names its table of functions, optimization, and the instruction sets to compile for."""
_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wno-psabi")


def build_library() -> Path:
    """The compiled op library of this machine.

    Raises:
        TargetError: there is no C++ compiler, or it cannot compile the sources.
        InputError, ResourceError: the cache folder cannot be written.
    """
    compiler = find_compiler()
    version = run_compiler([compiler, "--version"], "--version")
    sources = {name: (resources.files("optc.compiler.kernels.cpu") / name).read_bytes() for name in _SOURCES}
    abi = str(torch._C._GLIBCXX_USE_CXX11_ABI)
    digest = hashlib.sha256(
        repr((compiler, version, torch.__version__, abi, _FLAGS, _LOOPS, platform.machine())).encode()
    )
    for text in sources.values():
        digest.update(hashlib.sha256(text).digest())
    folder = cache_folder() / f"ops-{digest.hexdigest()[:24]}"
    library = folder / FILE_NAME
    if library.is_file():
        return library
    with os_errors("building the op library", str(folder)):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            place = Path(scratch)
            for name, text in sources.items():
                (place / name).write_bytes(text)
            _compile(compiler, place, abi)
            os.replace(place / FILE_NAME, library)
    return library


def cache_folder() -> Path:
    """Where compiled libraries are kept: `$XDG_CACHE_HOME/optc`, or `~/.cache/optc`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "optc"


def _compile(compiler: str, place: Path, abi: str) -> None:
    """Compile the inner loops for each instruction set, the ops, and link them."""
    root = Path(torch.__path__[0])
    common = [
        compiler,
        *_FLAGS,
        f"-D_GLIBCXX_USE_CXX11_ABI={int(abi == 'True')}",
        "-isystem",
        str(root / "include"),
    ]
    x86 = platform.machine() == "x86_64"
    commands = [
        [level, f"-D{macro}={stem}_{name}", *flags, str(place / f"{stem}.cpp"), f"{stem}_{name}"]
        for stem, macro, level, names in _LOOPS
        for name, flags in _INSTRUCTION_SETS.items()
        if name in names and (x86 or name == "baseline")
    ]
    defines = ["-DOPTC_HAS_AVX2"] if x86 else []
    commands += [[*defines, str(place / f"{stem}.cpp"), stem] for stem in _OPS]
    objects = [str(place / f"{name}.o") for *_, name in commands]

    def run(command: list[str], target: str) -> str:
        return run_compiler([*common, *command[:-1], "-c", "-o", target], "the op library")

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(run, commands, objects))
    link = ["-shared", f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
    run_compiler([*common, *objects, *link, "-o", str(place / FILE_NAME)], "the op library")
