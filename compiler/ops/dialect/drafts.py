"""What a round of drafting and verification does on the device beside its products, so that rounds need no host in between.

A round feeds each request its last token and k drafted ones (`lay_out_drafts_`), keeps the draft as far as the model agrees
(`accept_drafts_`), and drafts anew, token by token (`choose_draft_`). In the tables of requests, `heads` int64 [4, B], are:
the token that is fed next; its position; the positions for which there are slots, those below this one; and how many of the
request's drafted tokens are a draft. A request without slots left, or that is padding (no slots), stands still.
"""

from __future__ import annotations

import torch
from torch import Tensor

from optc.compiler.ops.dialect.paged import PADDING
from optc.compiler.ops.dialect.sampling import argmax
from optc.compiler.ops.library import define


def _slots(position: Tensor, limit: Tensor, tables: Tensor, size: int) -> Tensor:
    """The slots of positions [B, n], `PADDING` from `limit` [B] on."""
    column = (position // size).clamp(max=tables.shape[1] - 1)
    slot = tables.gather(1, column).long() * size + position % size
    return torch.where(position < limit[:, None], slot, PADDING)


def _lay_out_drafts(
    heads: Tensor,
    drafts: Tensor,
    block_tables: Tensor,
    input_ids: Tensor,
    position_ids: Tensor,
    slot_mapping: Tensor,
    context_lens: Tensor,
    *,
    block_size: int,
) -> None:
    """The inputs of a round: of each request k + 1 tokens, the requests one behind the other, each token by itself.

    Args:
        drafts: int64 [B or more, k or more], the first k are fed; token 0 where there is no draft.
        block_tables: int32 [B, MB].
        input_ids, position_ids, slot_mapping: int64 [B (k + 1)]. A position without a slot is 0, of padding.
        context_lens: int32 [B (k + 1) or more], tokens up to each of them; 0 where it is padding, and of what is behind.
    """
    token, position, limit, drafted = heads
    batch = len(token)
    count = len(input_ids) // batch
    place = torch.arange(count, device=heads.device)[None]
    drafts = torch.where(place[:, : count - 1] < drafted[:, None], drafts[:batch, : count - 1], 0)
    at = position[:, None] + place
    slots = _slots(at, limit, block_tables, block_size)
    real = slots != PADDING
    input_ids.copy_(torch.cat((token[:, None], drafts), 1).flatten())
    position_ids.copy_(torch.where(real, at, 0).flatten())
    slot_mapping.copy_(slots.flatten())
    context_lens.zero_()
    context_lens[: batch * count] = torch.where(real, at + 1, 0).flatten().int()


def _accept_drafts(
    decided: Tensor,
    heads: Tensor,
    drafts: Tensor,
    block_tables: Tensor,
    picks: Tensor,
    position_ids: Tensor,
    slot_mapping: Tensor,
    context_lens: Tensor,
    *,
    block_size: int,
    made: int,
) -> tuple[Tensor, Tensor]:
    """Keep drafts, in `heads`, as far as they are what is decided behind the tokens that `lay_out_drafts_` laid out.

    Args:
        decided: int64 [B (k + 1)]; `NO_TOKEN` is no draft's.
        made: tokens that are drafted next, which `heads` will name where the request has gone on.
        picks: int64 [B], where in a round's tokens that one is behind which the request goes on.
        position_ids, slot_mapping: int64 [n, B]; context_lens: int32 [n, B]. Of the n positions behind that one, for
            drafting: the draft model has at position i the token i + 1.

    Returns:
        int64 [B, k + 3]: `decided`, how many of them are the request's next tokens (0 where it stood still), and how many
        drafted tokens were verified; and int64 [B (k + 1)]: `decided` as tokens that can be fed.
    """
    token, position, limit, drafted = heads.clone()
    batch, places = len(token), torch.arange(len(decided), device=decided.device)
    table = decided.view(batch, -1)
    width = table.shape[1]
    verified = torch.minimum(drafted, (limit - position - 1).clamp(0, width - 1))
    agree = (table[:, :-1] == drafts[:batch, : width - 1]) & (places[: width - 1] < verified[:, None])
    room = (limit - position).clamp(min=0)
    count = torch.minimum(1 + agree.long().cumprod(1).sum(1), room)
    outcome = torch.cat((table, count[:, None], verified[:, None]), 1)
    picked = (count - 1).clamp(min=0)
    picks.copy_(places[:batch] * width + picked)
    ids = decided.clamp(min=0)
    heads[0] = torch.where(count > 0, ids[picks], token)
    heads[3] = torch.where(count > 0, made, 0)
    heads[1] = position + count
    if len(position_ids):
        behind = (position + count)[:, None] + torch.arange(len(position_ids), device=decided.device)
        slots = _slots(behind, limit, block_tables, block_size)
        real = slots != PADDING
        position_ids.copy_(torch.where(real, behind, 0).T)
        slot_mapping.copy_(slots.T)
        context_lens.copy_(torch.where(real, behind + 1, 0).T)
    return outcome, ids


def _choose_draft(logits: Tensor, targets: Tensor, drafts: Tensor, *, place: int) -> Tensor:
    """int64 [B]: of the token with the largest logit [B, D] of each row, the token that it stands for, targets int64 [D]; 0
    where that logit is not finite. It is written into column `place` of drafts int64 [B or more, any]."""
    tokens = targets[argmax(logits).clamp(min=0)]
    drafts[: len(tokens), place] = tokens
    return tokens


define(
    "lay_out_drafts_(Tensor heads, Tensor drafts, Tensor block_tables, Tensor(a!) input_ids, Tensor(b!) position_ids, "
    "Tensor(c!) slot_mapping, Tensor(d!) context_lens, *, int block_size) -> ()",
    _lay_out_drafts,
    lambda *_, **__: None,
)
define(
    "accept_drafts_(Tensor decided, Tensor(a!) heads, Tensor drafts, Tensor block_tables, Tensor(b!) picks, "
    "Tensor(c!) position_ids, Tensor(d!) slot_mapping, Tensor(e!) context_lens, *, int block_size, int made) "
    "-> (Tensor, Tensor)",
    _accept_drafts,
    lambda decided, heads, *_, **__: (
        decided.new_empty((heads.shape[1], decided.shape[0] // heads.shape[1] + 2)),
        decided.new_empty(decided.shape[0]),
    ),
)
define(
    "choose_draft_(Tensor logits, Tensor targets, Tensor(a!) drafts, *, int place) -> Tensor",
    _choose_draft,
    lambda logits, targets, drafts, **_: targets.new_empty(logits.shape[0]),
)
