"""The kernel of `fused_norm` on CUDA: which calls it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from optc.compiler.kernels.cuda.dispatch import FLOATS, implement
from optc.compiler.kernels.kernel import one_of
from optc.compiler.ops.packed.cuda import NORMS

MOST_COLUMNS = 1 << 14
"""A program holds a row in registers."""


def accepts(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """Rows of a float type, with a residual of the same; see `MOST_COLUMNS`."""
    x, weight, bias, residual = args
    if kwargs.get("norm", "") not in NORMS:
        return f"no kernel has the norm '{kwargs['norm']}'"
    if x.shape[-1] > MOST_COLUMNS:
        return f"{x.shape[-1]} columns; the kernel takes up to {MOST_COLUMNS}"
    if any(item is not None and item.shape != x.shape[-1:] for item in (weight, bias)):
        return "a weight or bias of the norm is not of one row's shape"
    if residual is not None and residual.dtype is not x.dtype:
        return f"a residual of {residual.dtype} for rows of {x.dtype}"
    if residual is not None and residual.shape != x.shape:
        return f"a residual of {list(residual.shape)} for rows of {list(x.shape)}"
    if any(item is not None and not item.is_contiguous() for item in (weight, bias)):
        return "a weight or bias of the norm is not contiguous"
    return one_of(x.dtype, FLOATS, "rows")


FUSED_NORM = implement("fused_norm", accepts, tolerance=1e-5, module="norm.launch")
