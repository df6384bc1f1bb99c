"""`paged_attention_` and `rotary_paged_attention_` on CUDA: see `optc.compiler.kernels.cuda.attention`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from optc.compiler.kernels.cuda.dispatch import implement
from optc.compiler.kernels.kernel import one_of, typed_otherwise
from optc.compiler.ops.attention_arguments import CHUNKS_REFUSED

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST, MOST_GROUPED = 256, 64
"""Features of a head, and query heads of a KV head, that fit into registers."""
SHORT_CONTEXT = 1024
"""Tokens, by the width of the block tables, up to which many requests have a program for each KV head."""
LEAST_DENSE = 8192
"""Tokens of the smallest call of one prompt that cuDNN is asked to attend: it was faster there, and slower at half as many. No
call of as many is captured in a graph."""
_POSITIONS = {5: torch.int64, 6: torch.int32, 7: torch.int32, 8: torch.int32, 9: torch.int64}
"""Argument -> its type: slot_mapping, block_tables, context_lens, cu_seqlens, and position where there is one."""


def accepts(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """One type for queries, keys, values and pools, heads that fit, and positions as sessions make them."""
    q, k, v, k_pool, v_pool = args[:5]
    if len({tensor.dtype for tensor in args[:5]}) != 1:
        return "q, k, v and the pools differ in type"
    odd = typed_otherwise(args, _POSITIONS)
    if odd is not None:
        return odd
    if max(q.shape[2], v.shape[2]) > WIDEST:
        return f"heads of {max(q.shape[2], v.shape[2])} features; the kernel takes up to {WIDEST}"
    if q.shape[1] % k.shape[1] or q.shape[1] // k.shape[1] > MOST_GROUPED:
        return f"{q.shape[1]} query heads for {k.shape[1]} KV heads; the kernel takes up to {MOST_GROUPED} for one"
    if kwargs.get("scale", 1.0) <= 0.0:
        return f"scores times {kwargs['scale']}; the kernel takes positive factors"
    if k_pool.stride(3) != 1 or v_pool.stride(3) != 1:
        return "the features of a head are not neighbours in the pools"
    if kwargs["window"] < 0:
        return CHUNKS_REFUSED
    return one_of(q.dtype, DTYPES, "keys and values")


def accepts_rotary(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """What `accepts` says, and float32 frequencies for pairs of features, weights of norms in the heads' type."""
    inv_freq: Tensor = args[10]
    norms = [weight for weight in args[11:13] if weight is not None]
    if inv_freq.dtype is not torch.float32:
        return f"inv_freq is {inv_freq.dtype}; the kernel takes torch.float32"
    if not 0 < 2 * inv_freq.shape[0] <= args[0].shape[2]:
        return f"{inv_freq.shape[0]} frequencies for heads of {args[0].shape[2]} features"
    if any(weight.shape != (args[0].shape[2],) for weight in norms):
        return "a norm's weight is not one of a head's features"
    return accepts(args, kwargs)


PAGED_ATTENTION = implement("paged_attention_", accepts, tolerance=3e-6, module="attention.launch")
ROTARY_PAGED_ATTENTION = implement(
    "rotary_paged_attention_",
    accepts_rotary,
    tolerance=2e-5,  # of angles of thousands of radians, whose cosines differ by their rounding
    module="attention.launch",
)
