"""What AOTInductor can run: every ATen operator, sizes, and the ops that have a kernel for the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

import optc.compiler.kernels  # noqa: F401  (registers them)
from optc.compiler.kernels.kernel import Device, find_kernel, kernels_for
from optc.compiler.target.target import Predicate


class AtenAndKernels(Mapping[Any, Predicate | None]):
    """ATen by namespace, as a table of it would only repeat torch's; ops of the dialect as their kernels say."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def __contains__(self, target: object) -> bool:
        if isinstance(target, torch._ops.OpOverload) and target.namespace in ("aten", "prims"):
            return True
        if getattr(target, "__module__", None) in ("_operator", "math", "torch"):  # arithmetic on sizes
            return True
        return find_kernel(target, self._device) is not None

    def __getitem__(self, target: Any) -> Predicate | None:
        if target not in self:
            raise KeyError(target)
        kernel = find_kernel(target, self._device)
        return None if kernel is None else kernel.obstacle

    def __iter__(self) -> Iterator[Any]:
        return iter(kernel.spec.op for kernel in kernels_for(self._device))

    def __len__(self) -> int:
        return len(kernels_for(self._device))


LEGAL: Mapping[Any, Predicate | None] = AtenAndKernels("cpu")
