"""From an op's call on CUDA tensors to the Triton kernel for it.

Implementations are opaque to Inductor: its own calls of Triton kernels do not forward dependent launch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module, util
from typing import Any, TypeVar

import torch

from optc.compiler.diagnostics import TargetError
from optc.compiler.ir.generated_code import last_call
from optc.compiler.kernels.kernel import Accepts, Kernel, TritonSources, register

_LIBRARY = torch.library.Library("optc", "FRAGMENT")


FLOATS = (torch.bfloat16, torch.float16, torch.float32)
"""What kernels compute on."""


def implement(
    op: str, accepts: Accepts, *, tolerance: float, module: str, configurations: tuple[str, ...] = ()
) -> Kernel:
    """Register a kernel in Triton: the function named like its op in `module`, for calls on CUDA tensors; see `call`.

    The arguments are those of `Kernel` and `TritonSources`; `module` is named below this package.
    """
    sources = TritonSources(module=f"{__package__}.{module}", configurations=configurations)
    kernel = Kernel(
        op=op, device="cuda", accepts=accepts, tolerance=tolerance, sources=sources, libraries=("torch", "triton")
    )
    _LIBRARY.impl(op, functools.partial(call, kernel), "CUDA")
    return register(kernel)


def call(kernel: Kernel, *args: Any, **kwargs: Any) -> Any:
    """Run a kernel on a call of its op.

    Calls that it does not take run the reference: stages before legalization, which refuses them for a target, run on a
    GPU too. What has passed legalization is run under `kernels_only`.

    Raises:
        KernelRefusalError: under `kernels_only`, for such calls.
        TargetError: at the first call, without triton: machines that only compile programs do not need it.
    """
    reason = kernel.accepts(args, kwargs)
    if reason is None:
        assert isinstance(kernel.sources, TritonSources)
        return _launcher(kernel.sources.module, kernel.op)(*args, **kwargs)
    if _KERNELS_ONLY.get():
        raise KernelRefusalError(kernel.op, reason)
    return kernel.spec.reference(*args, **kwargs)


class KernelRefusalError(TargetError):
    """A call of a legalized program that its kernel does not take as it came.

    Args:
        op: name in the dialect.
        reason: of the kernel.
        node: the line of the graph.
    """

    def __init__(self, op: str, reason: str, node: str | None = None) -> None:
        self.op, self.reason = op, reason
        super().__init__(
            f"the kernel of optc::{op} does not take a call that was found legal when the model was compiled",
            where=node,
            why=reason,
            remedy="compile the model again with this version of optc; if that does not help, report it with the config",
        )


_KERNELS_ONLY = ContextVar("kernels_only", default=False)


@contextmanager
def kernels_only() -> Iterator[None]:
    """Refuse what kernels do not take, instead of running references, which are slow; in this thread.

    Raises:
        KernelRefusalError: names the graph's call as well, where one made it.
    """
    before = _KERNELS_ONLY.set(True)
    try:
        yield
    except KernelRefusalError as refusal:
        raise KernelRefusalError(refusal.op, refusal.reason, refusal.where or last_call(refusal)) from refusal
    finally:
        _KERNELS_ONLY.reset(before)


_WHOLE_PROMPT: ContextVar[int | None] = ContextVar("whole_prompt", default=None)


@contextmanager
def whole_prompt(tokens: int) -> Iterator[None]:
    """Say what the host knows of calls of paged attention, in this thread, so that none has to ask the device.

    Args:
        tokens: of the only request of a call, where they are its whole context; 0 for any other call.
    """
    before = _WHOLE_PROMPT.set(tokens)
    try:
        yield
    finally:
        _WHOLE_PROMPT.reset(before)


def told_prompt() -> int | None:
    """What `whole_prompt` says; None where nobody says anything."""
    return _WHOLE_PROMPT.get()


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
