"""From an op's call on CUDA tensors to the Triton kernel for it.

Implementations are opaque to Inductor: its own calls of Triton kernels do not forward dependent launch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module, util
from typing import Any, TypeVar

import torch

from optc.compiler.diagnostics import TargetError
from optc.compiler.kernels.kernel import Kernel, TritonSources, register

_LIBRARY = torch.library.Library("optc", "FRAGMENT")


def implement(kernel: Kernel) -> Kernel:
    """Register `kernel`, and the function named like its op in its module for calls on CUDA tensors.

    Calls that the kernel does not take run the reference: stages before legalization, which refuses them for a target,
    run on a GPU too.

    Raises:
        TargetError: at the first call, without triton: machines that only compile programs do not need it.
    """
    sources = kernel.sources
    assert isinstance(sources, TritonSources)

    def run(*args: Any, **kwargs: Any) -> Any:
        if kernel.accepts(args, kwargs) is not None:
            return kernel.spec.reference(*args, **kwargs)
        return _launcher(sources.module, kernel.op)(*args, **kwargs)

    _LIBRARY.impl(kernel.op, run, "CUDA")
    return register(kernel)


@functools.cache
def _launcher(module: str, op: str) -> Callable[..., Any]:
    if util.find_spec("triton") is None:
        raise TargetError(
            f"the kernel of optc::{op} needs the package triton, which is not installed",
            remedy="pip install triton, in the version that this torch names",
        )
    found: Callable[..., Any] = getattr(import_module(module), op)
    return found


@functools.cache
def dependent_launch(device: torch.device) -> bool:
    """Whether kernels on a device can begin before their predecessor ends (compute capability 9.0 and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


ScratchT = TypeVar("ScratchT")


def scratch(make: Callable[..., ScratchT]) -> Callable[..., ScratchT]:
    """Let a function of (device, sizes...) make memory once and keep it for good: captured graphs point at it.

    Launches that share it run one after the other: steps of one model on one stream.
    """

    @functools.cache
    def kept(device: torch.device, *sizes: int) -> ScratchT:
        assert not is_capturing(device), "the first call of a shape makes what all later ones use: not inside a graph"
        return make(device, *sizes)

    return kept


def is_capturing(device: torch.device) -> bool:
    """Whether the current stream records a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
