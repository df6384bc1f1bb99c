"""Kernels: implementations of ops of the dialect on a device.

One `Kernel` says all there is to know of one: which op, which calls it takes, how far it may be from the reference, what
it is made of and what it needs. Legality, legalization, packaging and a manifest's needs are derived from it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.fx import Node

from optc.compiler.ir.program import Program
from optc.compiler.ops.library import OpSpec, find, named

Device = Literal["cpu", "cuda"]
Accepts = Callable[[Sequence[Any], Mapping[str, Any]], str | None]
"""From the arguments of a call (tensors, fake ones in graphs) and its keyword arguments to why a kernel cannot take it;
None where it can."""


@dataclass(frozen=True, kw_only=True)
class Loop:
    """A C++ file of inner loops that is compiled once per instruction set; which copy runs is decided on the host.

    Attributes:
        stem: of the file.
        macro: names the table of functions that one copy exports, e.g. `OPTC_TILE=tile_avx2`.
        optimization: a compiler flag.
        levels: names of instruction sets, see `library.INSTRUCTION_SETS`.
    """

    stem: str
    macro: str
    optimization: str
    levels: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class CppSources:
    """A kernel in C++.

    Attributes:
        package: where the files are.
        op: stem of the file that registers the op's implementation.
        headers: what the files include.
        loops: inner loops that it calls.
    """

    package: str
    op: str
    headers: tuple[str, ...] = ()
    loops: tuple[Loop, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TritonSources:
    """A kernel in Triton, compiled when it is first launched.

    Attributes:
        module: the Python module with the functions that launch it. It imports triton, so it is imported by the first
            call, not when the kernel is registered.
        configurations: files beside the module with measured tables of tile sizes.
    """

    module: str
    configurations: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """An implementation of an op on a device.

    Attributes:
        op: name in the dialect, whose reference it is held to.
        accepts: why it cannot take a call, or None.
        tolerance: largest difference from the reference, both computed in float32, as a share of its largest output.
        sources: what it is built of.
        libraries: packages whose version (major.minor) must be the same where it runs.
        cpu_flags: processor flags, as Linux names them, without which it does not run at all.
    """

    op: str
    device: Device
    accepts: Accepts
    tolerance: float
    sources: CppSources | TritonSources
    libraries: tuple[str, ...] = ()
    cpu_flags: tuple[str, ...] = ()

    @property
    def spec(self) -> OpSpec:
        """The op."""
        spec = named(self.op)
        assert spec is not None, f"a kernel of optc::{self.op}, which is no op"
        return spec

    def obstacle(self, node: Node) -> str | None:
        """Why it cannot take a call of a graph, or None."""
        return self.obstacle_of(node.args, node.kwargs)

    def obstacle_of(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
        """The same of a call that is not made yet; nodes stand for their values."""
        values, options = torch.fx.node.map_arg((tuple(args), dict(kwargs)), lambda item: item.meta["val"])
        return self.accepts(values, options)


_KERNELS: list[Kernel] = []


def register(kernel: Kernel) -> Kernel:
    """Make a kernel known."""
    assert all((kernel.op, kernel.device) != (other.op, other.device) for other in _KERNELS), kernel.op
    _KERNELS.append(kernel)
    return kernel


def kernels_for(device: Device) -> tuple[Kernel, ...]:
    """The kernels of a device."""
    return tuple(kernel for kernel in _KERNELS if kernel.device == device)


def find_kernel(target: object, device: Device) -> Kernel | None:
    """The kernel for calls of an operator on a device, or None."""
    return next((kernel for kernel in kernels_for(device) if kernel.spec.op is target), None)


def used_kernels(program: Program, device: Device) -> tuple[Kernel, ...]:
    """The kernels that a program calls."""
    called = {node.target for node in program.graph.nodes if node.op == "call_function"}
    return tuple(kernel for kernel in kernels_for(device) if kernel.spec.op in called)


def without_kernel(program: Program, device: Device) -> list[str]:
    """The calls of ops of the dialect that no kernel of a device takes, with reasons."""
    found = []
    for node in program.graph.nodes:
        if find(node.target) is None:
            continue
        kernel = find_kernel(node.target, device)
        reason = "there is none" if kernel is None else kernel.obstacle(node)
        if reason is not None:
            found.append(f"{node.name}: {node.target}: {reason}")
    return found


def needs_of(kernels: Iterable[Kernel], versions: Callable[[str], str]) -> dict[str, Any]:
    """What a host must have for kernels, as a manifest says it.

    Args:
        versions: from a package to its version here.
    """
    found = tuple(kernels)
    needs: dict[str, Any] = {
        name: ".".join(versions(name).split(".")[:2]) for kernel in found for name in kernel.libraries
    }
    flags = sorted({flag for kernel in found for flag in kernel.cpu_flags})
    return {**needs, "cpu_flags": flags} if flags else needs


def typed_otherwise(args: Sequence[Any], types: Mapping[int, torch.dtype]) -> str | None:
    """The reason against the first argument that is there and has another type than `types` says, by its index."""
    for index, dtype in types.items():
        tensor = args[index] if index < len(args) else None
        if tensor is not None and tensor.dtype is not dtype:
            return f"argument {index} is {tensor.dtype}; the kernel takes {dtype}"
    return None


def one_of(dtype: torch.dtype, dtypes: Iterable[torch.dtype], what: str) -> str | None:
    """The reason against a dtype that is not among `dtypes`."""
    names = [str(item).removeprefix("torch.") for item in dtypes]
    if dtype in dtypes:
        return None
    return f"{what} of type {str(dtype).removeprefix('torch.')}; the kernel takes {', '.join(names)}"
