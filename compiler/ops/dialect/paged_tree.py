"""Paged attention of tokens that are a tree: several guesses of what comes next, verified in one call (Miao et al. 2024,
SpecInfer, https://arxiv.org/abs/2305.09781; Cai et al. 2024, Medusa, https://arxiv.org/abs/2401.10774).

The new tokens of a request lie in slots one behind the other, as in `paged_attention_`, but each says itself which of them
it follows. A token's position is that of the request's past and the number of new tokens that it sees before itself.
"""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from optc.compiler.ops.attention_arguments import CAUSAL_KNOBS, Knobs, is_near
from optc.compiler.ops.dialect.attention import masked_attention
from optc.compiler.ops.dialect.paged import POOLS, TABLES, attend_requests, paged_attention_fake
from optc.compiler.ops.library import define

CAUSAL = -1
"""In place of a token's bits: it sees all new tokens of its request up to itself."""
MOST_TOKENS = 63
"""Of a tree, its root counted: the bits of an int64 that are no sign."""


def seen_tokens(bits: Tensor) -> Tensor:
    """bool [S, S], which of the S new tokens of a request each of them sees.

    Args:
        bits: int64 [S]: bit j says whether it sees token j, 63 at most; itself among them, and none behind it. Or `CAUSAL`.
    """
    token = torch.arange(len(bits), device=bits.device)
    marked = (bits[:, None] >> token.clamp(max=MOST_TOKENS)) & 1
    named = (marked == 1) & (token < MOST_TOKENS)
    return torch.where((bits == CAUSAL)[:, None], token <= token[:, None], named)


def _paged_tree_attention(*args: Tensor, **knobs: Unpack[Knobs]) -> Tensor:
    """`paged_attention_`, but new tokens of a request see those new ones that `tree` (int64 [N], see `seen_tokens`) says."""
    *shared, tree = args

    def attend(query: Tensor, keys: Tensor, values: Tensor, fresh: slice) -> Tensor:
        past, seen = keys.shape[2] - query.shape[2], seen_tokens(tree[fresh])
        new = past + seen.sum(1) - 1
        position = torch.cat([torch.arange(past, device=query.device), new])
        keep = torch.cat([seen.new_ones((len(seen), past)), seen], 1)
        if knobs["window"]:
            keep &= is_near(new[:, None], position, knobs["window"])
        return masked_attention(
            query, keys, values, keep[None, None], None, scale=knobs["scale"], softcap=knobs["softcap"]
        )

    return attend_requests(attend, *shared)


define(
    f"paged_tree_attention_({POOLS}, {TABLES}, Tensor tree, *, {CAUSAL_KNOBS}) -> Tensor",
    _paged_tree_attention,
    paged_attention_fake,
    attends="NHD",
)
