"""Rows of a tensor as the CUDA kernel (compiler/kernels/cuda/rows) takes them: of an embedding, or those in front of a
head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from optc.compiler.ops.library import define


def _select_rows(rows: Tensor, indices: Tensor, *, factor: float = 1.0) -> Tensor:
    """rows[indices] * factor, computed in float32 and rounded once, to the type of the rows.

    Args:
        rows: [N, C]. indices: int64, of any shape; the result has C behind it. A kernel makes NaN of rows that there are
            not; the reference raises.
    """
    found = torch.embedding(rows, indices)
    return found if factor == 1.0 else (found.float() * factor).to(rows.dtype)


def _select_rows_fake(rows: Tensor, indices: Tensor, **_: Any) -> Tensor:
    return rows.new_empty((*indices.shape, rows.shape[1]))


define(
    "select_rows(Tensor rows, Tensor indices, *, float factor=1.) -> Tensor",
    _select_rows,
    _select_rows_fake,
    aten=_select_rows,
)
