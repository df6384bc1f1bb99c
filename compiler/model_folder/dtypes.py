"""The types that a model's weights are stored and computed in, by their names on the command line."""

from __future__ import annotations

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def dtype_name(dtype: torch.dtype | None) -> str | None:
    """fp32, bf16 or fp16; None of others."""
    return next((name for name, known in DTYPES.items() if known is dtype), None)
