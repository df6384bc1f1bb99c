"""`sample_` and `argmax` on CUDA: see `optc.compiler.kernels.cuda.sampling`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from optc.compiler.kernels.cuda.dispatch import implement
from optc.compiler.kernels.kernel import one_of, typed_otherwise

LOGITS = (torch.float32, torch.bfloat16, torch.float16)
_TYPES = {
    1: torch.float32, 2: torch.int32, 3: torch.float32, 4: torch.float32, 5: torch.float32, 6: torch.float32,
    7: torch.float32, 8: torch.bool, 9: torch.int32, 10: torch.int64, 11: torch.int64,
}  # fmt: skip
"""Argument of `sample_` -> its type."""


def accepts(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """Logits of a floating type, and the parameters of `sample_` in the types that its reference names."""
    odd = typed_otherwise(args, _TYPES)
    if odd is not None:
        return odd
    if any(table is not None and not table.is_contiguous() for table in args[8:10]):
        return "the tables of seen tokens and counts are not contiguous"
    return one_of(args[0].dtype, LOGITS, "logits")


SAMPLE = implement("sample_", accepts, tolerance=0.0, module="sampling.launch")
ARGMAX = implement("argmax", accepts, tolerance=0.0, module="sampling.launch")
