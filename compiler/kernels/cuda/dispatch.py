"""From an op's call on CUDA tensors to the Triton kernel for it.

Implementations are opaque to Inductor: its own calls of Triton kernels do not forward dependent launch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module, util
from typing import Any

import torch

from optc.compiler.kernels.kernel import Kernel, TritonSources, register

_LIBRARY = torch.library.Library("optc", "FRAGMENT")


def implement(kernel: Kernel) -> Kernel:
    """Register `kernel`, and the function named like its op in its module for calls on CUDA tensors.

    Calls that the kernel does not take run the reference: stages before legalization, which refuses them for a target,
    run on a GPU too.
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
    found: Callable[..., Any] = getattr(import_module(module), op)
    return found


@functools.cache
def triton_missing() -> str | None:
    """Why Triton kernels cannot run in this environment, or None."""
    return None if util.find_spec("triton") else "triton is not installed"


@functools.cache
def dependent_launch(device: torch.device) -> bool:
    """Whether kernels on a device can begin before their predecessor ends (compute capability 9.0 and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
