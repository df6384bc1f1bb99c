"""The kernels of `lay_out_drafts_`, `accept_drafts_` and `choose_draft_` on CUDA: which calls they take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from optc.compiler.kernels.cuda.dispatch import FLOATS, implement
from optc.compiler.kernels.kernel import one_of


def accepts_layout(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """Tables of rounds as engines keep them."""
    heads, drafts, tables, *inputs, lengths = args
    return _otherwise([heads, *inputs], drafts, tables, lengths)


def accepts_verification(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """What was decided, and tables of rounds as engines keep them."""
    decided, heads, drafts, tables, *inputs, lengths = args
    return _otherwise([decided, heads, *inputs], drafts, tables, lengths)


def _otherwise(integers: list[Tensor], drafts: Tensor, tables: Tensor, lengths: Tensor) -> str | None:
    if not all(item.is_contiguous() for item in (*integers, lengths)):
        return "an input of the round is not contiguous"
    if tables.stride(1) != 1 or drafts.stride(1) != 1:
        return "what a row of a table holds are not neighbours"
    if any(item.dtype != torch.int64 for item in (*integers, drafts)) or {tables.dtype, lengths.dtype} != {torch.int32}:
        return "tokens, positions and slots are int64, lengths and tables int32"
    return None


def accepts_choice(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """Logits whose rows are whole, and tokens as sessions keep them."""
    logits, targets, drafts = args
    if logits.stride(1) != 1 or not targets.is_contiguous():
        return "the logits of a token are not neighbours, or the tokens they stand for"
    return one_of(logits.dtype, FLOATS, "logits") or one_of(targets.dtype, (torch.int64,), "tokens")


LAY_OUT = implement("lay_out_drafts_", accepts_layout, tolerance=0.0, module="drafts.launch")
"""The beginning of a round: what is fed, and where its keys and values go."""
ACCEPT = implement("accept_drafts_", accepts_verification, tolerance=0.0, module="drafts.launch")
"""Behind the verification: what of a draft is kept, and where drafting goes on."""
CHOOSE = implement("choose_draft_", accepts_choice, tolerance=0.0, module="drafts.launch")
"""The end of a step of the draft model."""
