"""`fused_experts` on the CPU: the tokens of each expert together, by products of torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from optc.compiler.kernels.kernel import CppSources, Kernel, register, typed_otherwise

_TYPES = {**dict.fromkeys((0, 1, 2, 4), torch.float32), 3: torch.int64}
"""Argument -> its type: x, up, down, weights; indices."""


def accepts(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """Tokens and weights in float32, gates of two halves, no residual."""
    if args[5] is not None or not kwargs.get("gated"):
        return "experts have a gate, and no residual behind them"
    return typed_otherwise(args[:5], _TYPES)


FUSED_EXPERTS = register(
    Kernel(
        op="fused_experts",
        device="cpu",
        accepts=accepts,
        tolerance=3e-6,
        sources=CppSources(package="optc.compiler.kernels.cpu", op="fused_experts", headers=("torch_headers.h",)),
        libraries=("torch",),
    )
)
