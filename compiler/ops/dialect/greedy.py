"""The end of a greedy decode step: the choice, and the inputs of the next step, so that steps need no host in between."""

from __future__ import annotations

import torch
from torch import Tensor

from optc.compiler.ops.dialect.paged import PADDING
from optc.compiler.ops.dialect.sampling import argmax
from optc.compiler.ops.library import define


def _greedy_step(
    logits: Tensor,
    input_ids: Tensor,
    position_ids: Tensor,
    slot_mapping: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    *,
    block_size: int,
) -> Tensor:
    """`argmax` of logits [B, V], one token per request; the inputs of its step become those of the next, in place.

    Args:
        input_ids, position_ids, slot_mapping: int64 [B]. Requests whose slot is padding stay as they are. A row without
            a token (`NO_TOKEN`) feeds token 0, as the caller will have seen it by then.
        context_lens: int32 [B]. block_tables: int32 [B, MB], with the block of the next token.
    """
    tokens = argmax(logits)
    real = slot_mapping != PADDING
    position = position_ids + 1
    column = (position // block_size).clamp(max=block_tables.shape[1] - 1)
    block = block_tables.gather(1, column[:, None])[:, 0].long()
    input_ids.copy_(torch.where(real, tokens.clamp(min=0), input_ids))
    slot_mapping.copy_(torch.where(real, block * block_size + position % block_size, slot_mapping))
    position_ids.copy_(torch.where(real, position, position_ids))
    context_lens.add_(real)
    return tokens


define(
    "greedy_step_(Tensor logits, Tensor(a!) input_ids, Tensor(b!) position_ids, Tensor(c!) slot_mapping, "
    "Tensor(d!) context_lens, Tensor block_tables, *, int block_size) -> Tensor",
    _greedy_step,
    lambda logits, *_, **__: logits.new_empty(logits.shape[0], dtype=torch.int64),
)
