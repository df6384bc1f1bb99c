"""Sessions over an AOTInductor package: native code, weights in safetensors, caches written in place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch

from optc.compiler.artifact.manifest import Manifest
from optc.compiler.diagnostics import ArtifactError, InputError, ResourceError, TargetError, ran_out_of_memory
from optc.compiler.ir.contract import Contract
from optc.runtime.carried.pt2_runner import ArchiveError, Package, PackageError, check_archive
from optc.runtime.sessions.package_encoder_decoder import PackageEncoderDecoderSession
from optc.runtime.sessions.paged import PagedSession
from optc.runtime.sessions.session import Session, SessionOptions, default_threads
from optc.runtime.sessions.torch_linear import TorchSession


def open_artifact(folder: Path, manifest: Manifest, options: SessionOptions) -> Session:
    """The session for a verified package, static or paged.

    `options.threads` are those of torch in this process; None takes one per physical core that it may use.

    Raises:
        TargetError: this host cannot run the package.
        ArtifactError: it would be unpacked elsewhere than into a folder of its own, or to far more than its size.
    """
    run = _running(_opened(folder, manifest, options), folder)
    if manifest.contract.cross is not None:
        encoder = _running(_opened(folder, manifest.alone("encoder"), options), folder)
        return PackageEncoderDecoderSession(manifest, encoder, run, _limited(manifest))
    contract = _limited(manifest)
    if contract.kv_cache.kind == "paged":
        return PagedSession(run, contract, num_blocks=options.num_blocks)
    return TorchSession(run, contract)


def _running(package: Package, folder: Path) -> Callable[..., list[torch.Tensor]]:
    """A package as a function of flat tensors, with failures in words for users."""

    def run(*inputs: torch.Tensor) -> list[torch.Tensor]:
        try:
            return package(*inputs)
        except PackageError as error:
            raise InputError(
                "the package does not take these inputs",
                where=str(folder),
                why=str(error),
                remedy="use shorter prompts or a smaller batch; if they are short, compile the model again",
            ) from error
        except RuntimeError as error:
            if not ran_out_of_memory(error):
                raise
            raise ResourceError(
                "out of memory while running the package",
                why=str(error).splitlines()[0],
                remedy="use shorter prompts or a smaller batch",
            ) from error

    return run


def open_runner(folder: Path, manifest: Manifest) -> Callable[..., list[torch.Tensor]]:
    """The package of a manifest as a function of flat tensors.

    Raises:
        TargetError, ArtifactError: as `open_artifact`.
    """
    package = _opened(folder, manifest, SessionOptions())
    return lambda *inputs: package(*(item.contiguous() for item in inputs))


def _opened(folder: Path, manifest: Manifest, options: SessionOptions) -> Package:
    torch.set_num_threads(options.threads or default_threads())
    try:
        return Package(folder, manifest.engine_info, manifest.needs)
    except ArchiveError as error:
        raise _unpackable(error) from error
    except PackageError as error:
        raise TargetError(
            "the package cannot run on this host",
            where=str(folder),
            why=str(error),
            remedy="compile the model on this machine, or on one like it",
        ) from error


def open_caller(folder: Path, manifest: Manifest, options: SessionOptions) -> Callable[..., list[Any]]:
    """The package of an encoder or a module as a function of arrays, in the order of the contract's inputs.

    Numbers in bfloat16, which NumPy has not, are float32 outside.

    Raises:
        TargetError, ArtifactError: as `open_artifact`.
    """
    package = _opened(folder, manifest, options)
    types = [getattr(torch, spec.dtype) for spec in manifest.contract.inputs]

    def call(*arrays: Any) -> list[Any]:
        tensors = [torch.from_numpy(array).to(kind) for array, kind in zip(arrays, types, strict=True)]
        try:
            outputs = package(*tensors)
        except PackageError as error:
            raise InputError(
                "the package does not take these inputs",
                where=str(folder),
                why=str(error),
                remedy="give what optc inspect lists as its inputs",
            ) from error
        return [(item.float() if item.dtype is torch.bfloat16 else item).numpy() for item in outputs]

    return call


def check_files(folder: Path, manifest: Manifest) -> None:
    """Refuse a package that would be unpacked elsewhere than into a folder of its own, or to far more than its size.

    Raises:
        ArtifactError: names the member.
    """
    try:
        for info in manifest.engine_infos:
            check_archive(folder / str(info["model"]))
    except ArchiveError as error:
        raise _unpackable(error) from error


def _unpackable(error: ArchiveError) -> ArtifactError:
    return ArtifactError(
        "the package must not be unpacked", why=str(error), remedy="compile the model again; do not use this file"
    )


def _limited(manifest: Manifest) -> Contract:
    """The contract with the context that the package was compiled for (--max-seq-len)."""
    contract, limit = manifest.contract, manifest.engine_info["context_length"]
    model = msgspec.structs.replace(contract.model, context_length=limit or contract.model.context_length)
    return msgspec.structs.replace(contract, model=model)
