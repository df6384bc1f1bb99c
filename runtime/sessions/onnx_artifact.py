"""The session of an ONNX artifact, after its graph was checked and before ONNX Runtime is imported."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from optc.compiler.artifact.manifest import Manifest
from optc.compiler.artifact.onnx_check import check_onnx
from optc.compiler.diagnostics import TargetError
from optc.runtime.sessions.host_cpu import check_cpu
from optc.runtime.sessions.session import Session, SessionOptions, default_threads, other_graph


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
        from optc.runtime.sessions.ort_cuda import OrtCudaSession
        from optc.runtime.sessions.ort_encoder_decoder import OrtEncoderDecoderSession
    except ModuleNotFoundError as error:
        raise _not_installed(folder, error) from error
    if manifest.contract.cross is not None:
        return OrtEncoderDecoderSession(folder, manifest, threads=options.threads)
    session = OrtCudaSession if manifest.device == "cuda" else OrtSession
    return session(folder / str(name), manifest.contract, threads=options.threads)


def open_caller(folder: Path, manifest: Manifest, options: SessionOptions) -> Callable[..., list[Any]]:
    """The graph of an encoder or a module as a function of arrays, in the order of the contract's inputs.

    Raises:
        ArtifactError, TargetError: as `open_artifact`.
    """
    check_files(folder, manifest)
    check_cpu(manifest.needs)
    try:
        from optc.runtime.sessions.ort import open_engine
    except ModuleNotFoundError as error:
        raise _not_installed(folder, error) from error
    path = folder / str(manifest.engine_info["model"])
    engine = open_engine(path, options.threads or default_threads(), manifest.device)
    inputs = [spec.name for spec in manifest.contract.inputs]
    outputs = [spec.name for spec in manifest.contract.outputs]
    read = {item.name for item in engine.get_inputs()}  # an input that nothing reads is none of the graph's
    made = {item.name for item in engine.get_outputs()}
    if other := sorted([*(read - set(inputs)), *(set(outputs) - made)]):
        raise other_graph(path, f"{other[0]!r} is not in both")

    def call(*arrays: Any) -> list[Any]:
        feed = {name: array for name, array in zip(inputs, arrays, strict=True) if name in read}
        return list(engine.run(outputs, feed))

    return call


def _not_installed(folder: Path, error: ModuleNotFoundError) -> TargetError:
    return TargetError(
        "ONNX Runtime is not installed", where=str(folder), why=str(error), remedy='pip install "optc[onnx]"'
    )


def check_files(folder: Path, manifest: Manifest) -> None:
    """Refuse a graph that opens what it must not.

    Raises:
        ArtifactError: names what is wrong with it.
    """
    for info in manifest.engine_infos:
        for key in ("model", *(["first"] if info.get("first") else [])):
            name = info.get(key)
            check_onnx(folder, name if isinstance(name, str) else "")


def open_runner(folder: Path, manifest: Manifest) -> Callable[..., list[Any]]:
    """The graph of an ONNX or TensorRT artifact as a function of flat tensors, on the CPU.

    Raises:
        ArtifactError: the graph opens what it must not.
        TargetError: ONNX Runtime is not installed, or cannot load the graph.
    """
    return _runner(folder, manifest)


def open_cuda_runner(folder: Path, manifest: Manifest) -> Callable[..., list[Any]] | str:
    """The same on the GPU, or on the CPU where there is none; or why this machine cannot open the graph.

    Raises:
        ArtifactError, TargetError: as `open_runner`.
    """
    import torch

    if torch.cuda.is_available() and _has_cuda(folder):
        return _runner(folder, manifest, device="cuda")
    if manifest.dtype == "bfloat16":
        return "ONNX Runtime has no kernels of bfloat16 on the CPU, and this machine no GPU with its CUDA provider"
    instead = "the graph in ONNX Runtime's CPU provider, not in that of CUDA"
    return _runner(folder, manifest, opens_instead=instead)


def _has_cuda(folder: Path) -> bool:
    try:
        from optc.runtime.sessions.ort import has_cuda
    except ModuleNotFoundError as error:
        raise _not_installed(folder, error) from error
    return has_cuda()


def _runner(folder: Path, manifest: Manifest, **options: str) -> Callable[..., list[Any]]:
    name = str(manifest.engine_info["model"])
    check_onnx(folder, name)
    try:
        from optc.runtime.sessions.graph_runner import GraphRunner
    except ModuleNotFoundError as error:
        raise _not_installed(folder, error) from error
    return GraphRunner(folder / name, **options)
