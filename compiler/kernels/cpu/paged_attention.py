"""`paged_attention_` and `paged_tree_attention_` on the CPU: an online softmax over blocks of the pool, heads and queries
across threads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from optc.compiler.kernels.kernel import Accepts, CppSources, Kernel, Loop, one_of, register, typed_otherwise

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_POSITIONS = {5: torch.int64, 6: torch.int32, 7: torch.int32, 8: torch.int32}
"""Argument -> its type: slot_mapping, block_tables, context_lens, cu_seqlens."""
_TREE = 9


def accepts(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """One dtype for queries, keys, values and pools; positions in the types that the paged session makes."""
    dtypes = {tensor.dtype for tensor in args[:5]}
    if len(dtypes) != 1:
        return "q, k, v and the pools differ in type"
    return typed_otherwise(args, _POSITIONS) or one_of(dtypes.pop(), DTYPES, "keys and values")


def accepts_tree(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """The same, and what each token sees."""
    return accepts(args, kwargs) or typed_otherwise(args, {_TREE: torch.int64})


def _kernel(op: str, takes: Accepts) -> Kernel:
    return register(
        Kernel(
            op=op,
            device="cpu",
            accepts=takes,
            tolerance=3e-6,
            sources=CppSources(
                package="optc.compiler.kernels.cpu",
                op=op.removesuffix("_"),
                headers=("torch_headers.h", "tile.h", "paged.h"),
                loops=(Loop(stem="tile", macro="OPTC_TILE", optimization="-O3", levels=("baseline", "avx2")),),
            ),
            libraries=("torch",),
        )
    )


PAGED_ATTENTION = _kernel("paged_attention_", accepts)
PAGED_TREE_ATTENTION = _kernel("paged_tree_attention_", accepts_tree)
