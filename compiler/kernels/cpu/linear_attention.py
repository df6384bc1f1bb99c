"""`cached_linear_attention` on the CPU: the recurrence, heads and rows across threads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from optc.compiler.kernels.kernel import CppSources, Kernel, register, typed_otherwise


def accepts(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """Everything in float32, as captures have it in whatever type the model computes."""
    return typed_otherwise(args, dict.fromkeys(range(6), torch.float32))


LINEAR_ATTENTION = register(
    Kernel(
        op="cached_linear_attention",
        device="cpu",
        accepts=accepts,
        tolerance=3e-6,
        sources=CppSources(package="optc.compiler.kernels.cpu", op="linear_attention", headers=("torch_headers.h",)),
        libraries=("torch",),
    )
)
