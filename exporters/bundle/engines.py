"""The engines that a bundle has a C++ program for, and where their shared libraries are on this machine."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from optc.compiler.artifact.engines import check_facts
from optc.compiler.artifact.engines import find_engine as find
from optc.compiler.artifact.manifest import Manifest
from optc.compiler.diagnostics import TargetError
from optc.exporters.bundle.header import aotinductor_header, genai_header


@dataclass(frozen=True)
class Runtime:
    """Where an engine's libraries are.

    Attributes:
        variables: CMake variable -> its value on this machine, to build here.
        libraries: file name in `lib/` of a bundle -> file.
    """

    variables: dict[str, str]
    libraries: dict[str, Path]


@dataclass(frozen=True)
class BundleEngine:
    """How an engine's program is made.

    Attributes:
        name: folder of its sources.
        obstacle: why an artifact cannot be decoded with it, or None.
        header: text of `model.h` for an artifact in a folder.
        runtime: of this machine, None where it is not installed.
        extra: what installs it.
    """

    name: str
    obstacle: Callable[[Manifest], str | None]
    header: Callable[[Manifest, Path], str]
    runtime: Callable[[], Runtime | None]
    extra: str


def find_engine(manifest: Manifest) -> BundleEngine:
    """The engine of an artifact.

    Raises:
        TargetError: there is no program for it, or the artifact does not generate.
    """
    found = find(manifest.engine, manifest.target)
    engine: BundleEngine | None = found.bundle_engine()
    if engine is None:
        raise TargetError(
            f"there is no C++ program for artifacts of the target '{manifest.target}'",
            why=f"their engine is {manifest.engine}",
            remedy="compile the model for onnx-cpu or inductor-cpu",
        )
    reason = engine.obstacle(manifest) if manifest.contract.cross is None else "it has two programs"
    if reason is not None:
        raise TargetError(
            "a bundle needs a decoder with a KV cache", why=reason, remedy="compile a decoder, with its KV cache"
        )
    listed = {entry.path for entry in manifest.files}
    check_facts(found, manifest.engine_info, manifest.needs, listed, "manifest.json")
    return engine


def _genai_obstacle(manifest: Manifest) -> str | None:
    if manifest.engine_info.get("genai") is True:
        return None
    if manifest.contract.kind == "decoder" and manifest.contract.kv_cache.kind == "linear":
        return "its layers differ in KV heads or head sizes, which onnxruntime-genai cannot be told"
    return _not_decoder(manifest)


def _inductor_obstacle(manifest: Manifest) -> str | None:
    caches = manifest.contract.kv_cache.kind
    return None if caches in ("linear", "paged") else _not_decoder(manifest)


def _not_decoder(manifest: Manifest) -> str:
    contract = manifest.contract
    return f"the artifact is a model of kind '{contract.kind}' with KV cache '{contract.kv_cache.kind}'"


def _genai_runtime() -> Runtime | None:
    genai = _package("onnxruntime_genai")
    onnxruntime = _package("onnxruntime")
    if genai is None or onnxruntime is None:
        return None
    first = genai / "libonnxruntime-genai.so"
    second = next(iter(sorted((onnxruntime / "capi").glob("libonnxruntime.so*"))), None)
    if second is None or not first.is_file():
        return None
    return Runtime(
        {"ONNXRUNTIME_LIBRARY": str(second), "GENAI_LIBRARY": str(first)},
        {"libonnxruntime.so.1": second, first.name: first},
    )


def _torch_runtime() -> Runtime | None:
    root = _package("torch")
    if root is None:
        return None
    names = ("libtorch.so", "libtorch_cpu.so", "libc10.so", "libgomp.so.1")
    found = {name: root / "lib" / name for name in names if (root / "lib" / name).is_file()}
    return Runtime({"Torch_DIR": str(root / "share" / "cmake" / "Torch")}, found)


def _package(name: str) -> Path | None:
    """The folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(name)
    places = spec.submodule_search_locations if spec is not None else None
    return Path(next(iter(places))) if places else None


GENAI = BundleEngine(
    name="genai",
    obstacle=_genai_obstacle,
    header=lambda manifest, _: genai_header(manifest),
    runtime=_genai_runtime,
    extra="genai",
)
AOTINDUCTOR = BundleEngine(
    name="aotinductor",
    obstacle=_inductor_obstacle,
    header=aotinductor_header,
    runtime=_torch_runtime,
    extra="inductor",
)
