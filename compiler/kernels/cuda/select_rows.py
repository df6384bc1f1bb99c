"""The kernel of `select_rows` on CUDA: which calls it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from optc.compiler.kernels.cuda.dispatch import FLOATS, implement
from optc.compiler.kernels.kernel import one_of


def accepts(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """Rows of a float type, each of them whole, and indices as sessions make them."""
    rows, indices = args
    if rows.dim() != 2 or rows.stride(1) != 1:
        return "the elements of a row are not neighbours"
    if indices.dtype is not torch.int64:
        return f"rows are named by {indices.dtype}; the kernel takes torch.int64"
    return one_of(rows.dtype, FLOATS, "rows")


SELECT_ROWS = implement("select_rows", accepts, tolerance=0.0, module="rows.launch")
