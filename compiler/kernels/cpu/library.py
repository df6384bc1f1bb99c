"""The C++ op library of some kernels: objects compiled once per source, compiler and torch, kept in the user's cache."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch

from optc.compiler.diagnostics import ResourceError, TargetError, os_errors
from optc.compiler.files import replace_file
from optc.compiler.kernels.cpu.toolchain import find_compiler, run_compiler
from optc.compiler.kernels.kernel import CppSources, Kernel

FILE_NAME = "liboptc_ops.so"
TORCH_HEADERS = "torch_headers.h"
INSTRUCTION_SETS: dict[str, tuple[str, ...]] = {
    "baseline": (),
    "avx2": ("-march=x86-64-v3",),
    "avx512": ("-march=x86-64-v4", "-mavx512vnni"),
    "amx": ("-march=x86-64-v4", "-mavx512vnni", "-mamx-tile", "-mamx-int8"),
}
_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-Wno-psabi")


@dataclass(frozen=True)
class _Unit:
    """One object file: its source, what it includes, and flags behind the common ones."""

    package: str
    source: str
    headers: tuple[str, ...]
    flags: tuple[str, ...]

    def files(self) -> dict[str, bytes]:
        place = resources.files(self.package)
        return {name: (place / name).read_bytes() for name in (*self.headers, self.source)}

    def is_op(self) -> bool:
        """Whether the source is of this package and begins with the headers of torch; inner loops do without."""
        return self.package == __package__ and f'#include "{TORCH_HEADERS}"'.encode() in self.files()[self.source]


def build_library(kernels: Sequence[Kernel]) -> Path:
    """The compiled op library of this machine that holds these kernels.

    Raises:
        TargetError: there is no C++ compiler, or it cannot compile the sources.
        InputError, ResourceError: the cache folder cannot be written.
    """
    compiler = find_compiler()
    version = run_compiler([compiler, "--version"], "--version")
    common = _common(compiler)
    # Headers are known by torch's release and commit, not by their folder: environments share what is compiled.
    headers = (torch.__version__, torch.version.git_version, _abi())
    setting = (compiler, *_FLAGS, version, *headers, platform.machine())
    units = list(dict.fromkeys(unit for kernel in kernels for unit in _units(kernel)))
    names = [_object_name(unit, setting) for unit in units]
    folder = cache_folder()
    library = folder / f"ops-{_digest(sorted(names))}" / FILE_NAME
    if library.is_file():
        return library
    with os_errors("building the op library", str(folder)):
        objects = folder / "objects"
        for place in (objects, library.parent):
            place.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _alone_in(objects), tempfile.TemporaryDirectory() as scratch:
            missing = [(unit, name) for unit, name in zip(units, names, strict=True) if not (objects / name).is_file()]
            _compile_all(common, Path(scratch), objects, missing)
            _link(common, [objects / name for name in names], Path(scratch) / FILE_NAME)
            replace_file(library, (Path(scratch) / FILE_NAME).read_bytes())
    return library


def cache_folder() -> Path:
    """Where compiled libraries are kept: `$XDG_CACHE_HOME/optc`, or `~/.cache/optc`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "optc"


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """One process at a time: others wait for the objects that it compiles, which takes a minute, and find them."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # a filesystem without locks: each compiles for itself
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _common(compiler: str) -> list[str]:
    return [compiler, *_FLAGS, _abi(), "-isystem", str(Path(torch.__path__[0]) / "include")]


def _abi() -> str:
    return f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"


def _units(kernel: Kernel) -> list[_Unit]:
    """The inner loops for each instruction set, and the op, which is told its schema."""
    sources = kernel.sources
    assert isinstance(sources, CppSources), kernel.op
    x86 = platform.machine() == "x86_64"
    units = [
        _Unit(
            sources.package,
            f"{loop.stem}.cpp",
            sources.headers,
            (loop.optimization, f"-D{loop.macro}={loop.stem}_{level}", *INSTRUCTION_SETS[level]),
        )
        for loop in sources.loops
        for level in loop.levels
        if x86 or level == "baseline"
    ]
    schema = kernel.spec.schema.replace('"', '\\"')
    defines = (f'-DOPTC_SCHEMA="{schema}"', *(("-DOPTC_HAS_AVX2",) if x86 else ()))
    return [*units, _Unit(sources.package, f"{sources.op}.cpp", sources.headers, defines)]


def _digest(parts: Iterable[object]) -> str:
    return hashlib.sha256(repr(list(parts)).encode()).hexdigest()[:24]


def _object_name(unit: _Unit, setting: Sequence[str]) -> str:
    texts = [hashlib.sha256(text).hexdigest() for text in unit.files().values()]
    return f"{Path(unit.source).stem}-{_digest([*setting, *unit.flags, *texts])}.o"


def _compile_all(common: list[str], scratch: Path, objects: Path, missing: Sequence[tuple[_Unit, str]]) -> None:
    """Compile units on all cores; while the headers of torch are parsed, those that do not wait for them."""
    ops = [item for item in missing if item[0].is_op()]
    loops = [item for item in missing if item not in ops]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        parsed = pool.submit(_parse_headers, common, scratch, [unit for unit, _ in ops])
        jobs = [pool.submit(_compile, common, scratch, objects, *item, None) for item in loops]
        jobs += [pool.submit(_compile, common, scratch, objects, *item, parsed) for item in ops]
        for job in jobs:
            job.result()


def _parse_headers(common: list[str], scratch: Path, ops: Sequence[_Unit]) -> Path | None:
    """The headers of torch, precompiled; None for a single op, which is as fast without."""
    if len(ops) < 2:
        return None
    header = scratch / TORCH_HEADERS
    header.write_bytes(ops[0].files()[TORCH_HEADERS])
    made = scratch / f"{TORCH_HEADERS}.gch"
    try:
        run_compiler([*common, "-x", "c++-header", str(header), "-o", str(made)], "the op library")
    except (TargetError, ResourceError):  # it takes some 100 MB; if anything else is wrong, the ops say so themselves
        made.unlink(missing_ok=True)
        return None
    return made


def _compile(
    common: list[str], scratch: Path, objects: Path, unit: _Unit, name: str, parsed: Future[Path | None] | None
) -> None:
    place = scratch / name.removesuffix(".o")
    place.mkdir()
    for file, text in unit.files().items():
        (place / file).write_bytes(text)
    if parsed is not None and (headers := parsed.result()) is not None:
        (place / headers.name).symlink_to(headers)  # beside the header, where the compiler looks for it
    made = place / name
    command = [*common, *unit.flags, str(place / unit.source), "-c", "-o", str(made)]
    run_compiler(command, "the op library")
    replace_file(objects / name, made.read_bytes())


def _link(common: list[str], objects: Sequence[Path], library: Path) -> None:
    link = ["-shared", f"-L{Path(torch.__path__[0]) / 'lib'}", "-ltorch_cpu", "-lc10"]
    run_compiler([*common, *map(str, objects), *link, "-o", str(library)], "the op library")
