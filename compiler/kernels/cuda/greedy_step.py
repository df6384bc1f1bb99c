"""The kernel of `greedy_step_` on CUDA: which calls it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from optc.compiler.kernels.cuda.dispatch import implement
from optc.compiler.kernels.kernel import Kernel, TritonSources, one_of

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def accepts(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """Logits whose rows are whole, and inputs of a step as sessions keep them."""
    if args[0].stride(1) != 1:
        return "the logits of a token are not neighbours"
    if any(not tensor.is_contiguous() for tensor in args[1:6]):
        return "an input of the step is not contiguous"
    types = (torch.int64, torch.int64, torch.int64, torch.int32, torch.int32)
    if tuple(tensor.dtype for tensor in args[1:6]) != types:
        return "ids, positions and slots are int64, lengths and tables int32"
    return one_of(args[0].dtype, DTYPES, "logits")


GREEDY_STEP = implement(
    Kernel(
        op="greedy_step_",
        device="cuda",
        accepts=accepts,
        tolerance=0.0,
        sources=TritonSources(module="optc.compiler.kernels.cuda.greedy.launch"),
        libraries=("torch", "triton"),
    )
)
