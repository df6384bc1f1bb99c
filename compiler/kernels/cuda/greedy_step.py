"""The kernels of `greedy_step_` and `advance_step_` on CUDA: which calls they take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from optc.compiler.kernels.cuda.dispatch import FLOATS, implement
from optc.compiler.kernels.kernel import one_of


def accepts(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """Logits whose rows are whole, and inputs of a step as sessions keep them."""
    if args[0].stride(1) != 1:
        return "the logits of a token are not neighbours"
    return _inputs_otherwise(args) or one_of(args[0].dtype, FLOATS, "logits")


def accepts_tokens(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """Tokens as `sample_` makes them, and inputs of a step as sessions keep them."""
    if not args[0].is_contiguous():
        return "the tokens are not neighbours"
    return _inputs_otherwise(args) or one_of(args[0].dtype, (torch.int64,), "tokens")


def _inputs_otherwise(args: Sequence[Any]) -> str | None:
    if any(not tensor.is_contiguous() for tensor in args[1:6]):
        return "an input of the step is not contiguous"
    types = (torch.int64, torch.int64, torch.int64, torch.int32, torch.int32)
    if tuple(tensor.dtype for tensor in args[1:6]) != types:
        return "ids, positions and slots are int64, lengths and tables int32"
    return None


GREEDY_STEP = implement("greedy_step_", accepts, tolerance=0.0, module="greedy.launch")
"""The end of a greedy decode step: largest logits, and the inputs of the next step."""
ADVANCE_STEP = implement("advance_step_", accepts_tokens, tolerance=0.0, module="greedy.launch")
"""The end of a step whose tokens were chosen before."""
