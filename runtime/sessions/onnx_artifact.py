"""The session of an ONNX artifact, after its graph was checked and before ONNX Runtime is imported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from optc.compiler.artifact.manifest import Manifest
from optc.compiler.artifact.onnx_check import check_onnx
from optc.compiler.diagnostics import TargetError
from optc.runtime.sessions.host_cpu import check_cpu
from optc.runtime.sessions.session import Session, SessionOptions


def open_artifact(folder: Path, manifest: Manifest, options: SessionOptions) -> Session:
    """The session for a verified ONNX artifact.

    Raises:
        ArtifactError: the graph opens what it must not.
        TargetError: ONNX Runtime is not installed, or this host cannot run the graph.
    """
    check_files(folder, manifest)
    name = manifest.engine_info["model"]
    check_cpu(manifest.needs)
    try:
        from optc.runtime.sessions.ort import OrtSession
    except ModuleNotFoundError as error:
        raise TargetError(
            "ONNX Runtime is not installed",
            where=str(folder),
            why=str(error),
            remedy='pip install "optc[onnx]"',
        ) from error
    return OrtSession(folder / str(name), manifest.contract, threads=options.threads)


def check_files(folder: Path, manifest: Manifest) -> None:
    """Refuse a graph that opens what it must not.

    Raises:
        ArtifactError: names what is wrong with it.
    """
    name = manifest.engine_info.get("model")
    check_onnx(folder, name if isinstance(name, str) else "")


def open_runner(folder: Path, manifest: Manifest) -> Callable[..., list[Any]]:
    """The graph of an ONNX or TensorRT artifact as a function of flat tensors, on the CPU.

    Raises:
        ArtifactError: the graph opens what it must not.
        TargetError: ONNX Runtime is not installed, or cannot load the graph.
    """
    name = str(manifest.engine_info["model"])
    check_onnx(folder, name)
    try:
        from optc.runtime.sessions.graph_runner import GraphRunner
    except ModuleNotFoundError as error:
        raise TargetError(
            "ONNX Runtime is not installed",
            where=str(folder),
            why=str(error),
            remedy='pip install "optc[onnx]"',
        ) from error
    return GraphRunner(folder / name)
