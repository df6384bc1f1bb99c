"""The C++ op library: built once per source, compiler and torch, and kept in the user's cache."""

from __future__ import annotations

import hashlib
import os
import platform
import tempfile
from importlib import resources
from pathlib import Path

import torch

from optc.compiler.diagnostics import os_errors
from optc.exporters.inductor.toolchain import find_compiler, run_compiler

FILE_NAME = "liboptc_ops.so"
_SOURCES = ("tile.h", "tile.cpp", "paged_attention.cpp")
_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wno-psabi")


def build_library() -> Path:
    """The compiled op library of this machine.

    Raises:
        TargetError: there is no C++ compiler, or it cannot compile the sources.
        InputError, ResourceError: the cache folder cannot be written.
    """
    compiler = find_compiler()
    version = run_compiler([compiler, "--version"], "--version")
    sources = {
        name: (resources.files("optc.exporters.inductor") / "csrc" / name).read_bytes() for name in _SOURCES
    }
    abi = str(torch._C._GLIBCXX_USE_CXX11_ABI)
    digest = hashlib.sha256(
        repr((compiler, version, torch.__version__, abi, _FLAGS, platform.machine())).encode()
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
    """Compile the tile arithmetic for each instruction set, the op, and link them."""
    root = Path(torch.__path__[0])
    common = [
        compiler,
        *_FLAGS,
        f"-D_GLIBCXX_USE_CXX11_ABI={int(abi == 'True')}",
        "-isystem",
        str(root / "include"),
    ]
    tiles: dict[str, list[str]] = {"tile_baseline": []}
    if platform.machine() == "x86_64":
        tiles["tile_avx2"] = ["-march=x86-64-v3"]
    objects = []
    for name, flags in tiles.items():
        objects.append(str(place / f"{name}.o"))
        command = [*common, *flags, f"-DOPTC_TILE={name}", "-c", str(place / "tile.cpp"), "-o", objects[-1]]
        run_compiler(command, "the op library")
    defines = ["-DOPTC_HAS_AVX2"] if "tile_avx2" in tiles else []
    link = ["-shared", f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
    source = str(place / "paged_attention.cpp")
    run_compiler([*common, *defines, source, *objects, *link, "-o", str(place / FILE_NAME)], "the op library")
