"""The kernels of `choose_experts` and `fused_experts` on CUDA: which calls they take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from optc.compiler.kernels.cuda.dispatch import FLOATS, implement
from optc.compiler.kernels.kernel import one_of
from optc.compiler.ops.packed.cuda import ACTIVATIONS

MOST_EXPERTS, MOST_SLOTS = 1024, 16
"""A warp holds the logits of a token in registers, and looks for one expert after the other."""


def accepts_choice(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """Logits [tokens, experts] whose rows are whole."""
    (logits,) = args
    if logits.shape[1] > MOST_EXPERTS or kwargs["slots"] > MOST_SLOTS:
        limits = f"the kernel takes up to {MOST_SLOTS} of {MOST_EXPERTS}"
        return f"{kwargs['slots']} of {logits.shape[1]} experts are chosen; {limits}"
    if logits.stride(1) != 1:
        return "the logits of a token are not neighbours"
    return one_of(logits.dtype, FLOATS, "logits")


def accepts(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """Tokens, weights and residual of one float type; see the op for their shapes."""
    x, up, down, indices, _, residual = args
    if kwargs.get("activation", "") not in ACTIVATIONS:
        return f"no kernel has the activation '{kwargs['activation']}'"
    if any(item is not None and item.dtype is not x.dtype for item in (up, down, residual)):
        return f"weights or a residual of another type than the tokens' {x.dtype}"
    if not up.is_contiguous() or not down.is_contiguous():
        return "the weights of experts are not one after the other"
    if indices.dtype is not torch.int64:
        return f"experts are chosen by {indices.dtype}; the kernel takes torch.int64"
    return one_of(x.dtype, FLOATS, "tokens")


CHOOSE_EXPERTS = implement("choose_experts", accepts_choice, tolerance=1e-6, module="experts.launch")
FUSED_EXPERTS = implement("fused_experts", accepts, tolerance=1e-5, module="experts.launch")
