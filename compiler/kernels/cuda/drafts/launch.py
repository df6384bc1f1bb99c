"""Launches of what a round of drafts does beside its products."""

from __future__ import annotations

import triton
from torch import Tensor

from optc.compiler.kernels.cuda.dispatch import dependent_launch
from optc.compiler.kernels.cuda.drafts.round import accept, choose_draft, lay_out
from optc.compiler.kernels.cuda.greedy.launch import BLOCK, count_parts, row_scratch


def lay_out_drafts_(
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
    """The op, for calls that the kernel accepts."""
    batch, pdl = heads.shape[1], dependent_launch(heads.device)
    count = len(input_ids) // batch
    lay_out[(batch,)](
        heads, drafts, block_tables, input_ids, position_ids, slot_mapping, context_lens,
        batch, drafts.stride(0), block_tables.stride(0), block_tables.shape[1], len(context_lens) - batch * count,
        COUNT=count, PLACES=triton.next_power_of_2(count), BLOCK_SIZE=block_size, PDL=pdl, num_warps=1, launch_pdl=pdl,
    )  # fmt: skip


def accept_drafts_(
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
    """The op, for calls that the kernel accepts."""
    batch, further, pdl = heads.shape[1], len(position_ids), dependent_launch(heads.device)
    count = len(decided) // batch
    outcome, behind = decided.new_empty((batch, count + 2)), decided.new_empty(len(decided))
    accept[(batch,)](
        decided, heads, drafts, block_tables, picks, position_ids, slot_mapping, context_lens, outcome, behind,
        batch, drafts.stride(0), block_tables.stride(0), block_tables.shape[1], made,
        COUNT=count, PLACES=triton.next_power_of_2(count), FURTHER=further,
        STEPS=triton.next_power_of_2(max(1, further)), BLOCK_SIZE=block_size, PDL=pdl, num_warps=1, launch_pdl=pdl,
    )  # fmt: skip
    return outcome, behind


def choose_draft_(logits: Tensor, targets: Tensor, drafts: Tensor, *, place: int) -> Tensor:
    """The op, for calls that the kernel accepts."""
    batch, size = logits.shape
    tokens = targets.new_empty(batch)
    parts, pdl = count_parts(batch, size), dependent_launch(logits.device)
    choose_draft[(parts, batch)](
        logits, targets, drafts[:, place], tokens, *row_scratch(logits.device, batch, parts),
        size, logits.stride(0), drafts.stride(0), BLOCK=BLOCK, PARTS=parts, PDL=pdl, num_warps=4, launch_pdl=pdl,
    )  # fmt: skip
    return tokens
