"""The end of a decode step: the inputs of the next one are left in place, so that steps need no host in between.

`greedy_step_` chooses tokens as well; `advance_step_` takes them from another choice, `sample_` for one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optc.compiler.ops.dialect.paged import PADDING
from optc.compiler.ops.dialect.sampling import argmax
from optc.compiler.ops.library import define


def _advance_step(
    tokens: Tensor,
    input_ids: Tensor,
    position_ids: Tensor,
    slot_mapping: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    *,
    block_size: int,
) -> None:
    """The inputs of a step become those of the next, in place, which is fed `tokens` [B], one per request.

    Args:
        tokens: int64. A row without a token (`NO_TOKEN`) feeds token 0, as the caller will have seen it by then.
        input_ids, position_ids, slot_mapping: int64 [B]. Requests whose slot is padding stay as they are.
        context_lens: int32 [B]. block_tables: int32 [B, MB], with the block of the next token.
    """
    real = slot_mapping != PADDING
    position = position_ids + 1
    column = (position // block_size).clamp(max=block_tables.shape[1] - 1)
    block = block_tables.gather(1, column[:, None])[:, 0].long()
    input_ids.copy_(torch.where(real, tokens.clamp(min=0), input_ids))
    slot_mapping.copy_(torch.where(real, block * block_size + position % block_size, slot_mapping))
    position_ids.copy_(torch.where(real, position, position_ids))
    context_lens.add_(real)


def _greedy_step(logits: Tensor, *inputs: Tensor, block_size: int) -> Tensor:
    """`argmax` of logits [B, V], one token per request; then `advance_step_`, whose inputs the others are."""
    tokens = argmax(logits)
    _advance_step(tokens, *inputs, block_size=block_size)
    return tokens


_INPUTS = (
    "Tensor(a!) input_ids, Tensor(b!) position_ids, Tensor(c!) slot_mapping, "
    "Tensor(d!) context_lens, Tensor block_tables, *, int block_size"
)

define(f"advance_step_(Tensor tokens, {_INPUTS}) -> ()", _advance_step, lambda *_, **__: None)
define(
    f"greedy_step_(Tensor logits, {_INPUTS}) -> Tensor",
    _greedy_step,
    lambda logits, *_, **__: logits.new_empty(logits.shape[0], dtype=torch.int64),
)
