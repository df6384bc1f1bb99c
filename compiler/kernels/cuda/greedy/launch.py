"""Launches of the ends of decode steps: for `greedy_step_` programs enough to read logits at the memory's speed."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from optc.compiler.kernels.cuda.dispatch import dependent_launch, scratch
from optc.compiler.kernels.cuda.greedy.step import advance_step, greedy_step

BLOCK, MOST_PARTS, MOST_PROGRAMS = 1024, 128, 1024
"""Logits that a program looks at at a time; programs of a row, and of one launch, but for one per row."""


def greedy_step_(
    logits: Tensor,
    input_ids: Tensor,
    position_ids: Tensor,
    slot_mapping: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    *,
    block_size: int,
) -> Tensor:
    """The op, for calls that the kernel accepts."""
    batch, size = logits.shape
    tokens = input_ids.new_empty(batch)
    if batch:
        parts, pdl = count_parts(batch, size), dependent_launch(logits.device)
        greedy_step[(parts, batch)](
            logits, tokens, input_ids, position_ids, slot_mapping, context_lens, block_tables,
            *row_scratch(logits.device, batch, parts), size, logits.stride(0), block_tables.shape[1],
            BLOCK_SIZE=block_size, BLOCK=BLOCK, PARTS=parts, PDL=pdl, num_warps=4, launch_pdl=pdl,
        )  # fmt: skip
    return tokens


def advance_step_(
    tokens: Tensor,
    input_ids: Tensor,
    position_ids: Tensor,
    slot_mapping: Tensor,
    context_lens: Tensor,
    block_tables: Tensor,
    *,
    block_size: int,
) -> None:
    """The op, for calls that the kernel accepts."""
    pdl = dependent_launch(tokens.device)
    if len(tokens):
        advance_step[(len(tokens),)](
            tokens, input_ids, position_ids, slot_mapping, context_lens, block_tables, block_tables.shape[1],
            BLOCK_SIZE=block_size, PDL=pdl, num_warps=1, launch_pdl=pdl,
        )  # fmt: skip


def count_parts(batch: int, size: int) -> int:
    """Programs that look for the largest of `size` logits of each of `batch` rows: a power of two."""
    wanted = min(max(1, MOST_PROGRAMS // batch), MOST_PARTS, triton.cdiv(size, BLOCK))
    found: int = triton.next_power_of_2(wanted)
    return found


@scratch
def row_scratch(device: torch.device, batch: int, parts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Largest logits of parts of rows, where they are, and arrivals."""
    values = torch.empty(batch, parts, device=device)
    places = torch.empty(batch, parts, dtype=torch.int32, device=device)
    return values, places, torch.zeros(batch, dtype=torch.int32, device=device)
