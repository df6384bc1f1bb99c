"""The session of a model folder: the graph that its own config and tensors capture to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from optc.compiler.artifact.manifest import Manifest
from optc.compiler.capture.loading import RESIDENT_BYTES, load_model
from optc.compiler.capture.pretrained import capture_pretrained
from optc.compiler.formats.layouts.tensors import CPU
from optc.compiler.ir.devices import choose_device, to_device
from optc.compiler.model_folder.dtypes import DTYPES
from optc.runtime.sessions.program import open_program
from optc.runtime.sessions.session import Session, SessionOptions


def open_artifact(folder: Path, manifest: Manifest, options: SessionOptions) -> Session:
    """The session for a verified model folder, in the type that it was written in.

    Raises:
        InputError: the folder cannot be captured.
        UsageError, TargetError: an unknown device, or one that is not here.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    place = choose_device(options.device)
    return open_program(to_device(capture_pretrained(folder, dtype=_dtype(manifest))[0], place))


def open_runner(folder: Path, manifest: Manifest, device: torch.device = CPU) -> Callable[..., list[torch.Tensor]]:
    """What the folder's own config and tensors compute, as a function of the inputs of the program they came from.

    Args:
        device: where its weights go and its inputs are.

    Weights of a quantized folder are read through its layout and become dense. Where the layout rounds activations, keys
    or values, the folder is captured instead, and its graph rounds them.

    Raises:
        InputError, CaptureError: the folder cannot be read back.
    """
    dtype = _dtype(manifest)
    rounds = any(item.activations for item in manifest.contract.quantization.values())
    if rounds or any(name.startswith("kv_cache.") for name in manifest.contract.sources):
        module = to_device(capture_pretrained(folder, dtype=dtype, prove=False)[0], device)
        return lambda *inputs: [out for out in (module(*inputs),) if isinstance(out, torch.Tensor)]
    model, _ = load_model(folder, dtype=DTYPES[dtype], attention="eager", resident_bytes=RESIDENT_BYTES, device=device)

    def run(*inputs: torch.Tensor) -> list[torch.Tensor]:
        # Rows are padded on the right: a causal model needs neither a mask nor positions, and makes its own.
        given = {
            spec.name: value.to(DTYPES[dtype]) if value.is_floating_point() else value
            for spec, value in zip(manifest.contract.inputs, inputs, strict=True)
            if spec.role != "position_ids"
        }
        with torch.no_grad():
            out = model(**given, return_dict=True)
        return [out[spec.name] for spec in manifest.contract.outputs]

    return run


def _dtype(manifest: Manifest) -> str:
    return next(name for name, kind in DTYPES.items() if str(kind) == f"torch.{manifest.dtype}")
