"""The kernel of `packed_embedding` on CUDA: which calls it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from optc.compiler.kernels.cuda.dispatch import FLOATS, implement
from optc.compiler.kernels.cuda.fused_linear import CODES as CODES_OF_LINEARS
from optc.compiler.kernels.cuda.fused_norm import MOST_COLUMNS
from optc.compiler.kernels.kernel import one_of, typed_otherwise
from optc.compiler.ops.packed.cuda import BLOCK, packed_columns

CODES = {name: CODES_OF_LINEARS[name] for name in ("int8", "int4")}


def accepts(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """Rows of codes and scales that lie together, in groups that divide them; see `MOST_COLUMNS`."""
    weight, scale, zero, _ = args
    format, size = kwargs["format"], kwargs["group_size"]
    if format not in CODES:
        return f"a table of the format '{format}'; the kernel takes {', '.join(CODES)}"
    columns = packed_columns(weight, format)
    if columns > MOST_COLUMNS:
        return f"{columns} columns; the kernel takes up to {MOST_COLUMNS}"
    if format == "int4" and columns % BLOCK:
        return f"{columns} columns of 4 bits; the kernel takes multiples of {BLOCK}"
    if scale.shape[1] * (size or columns) != columns:
        return f"{scale.shape[1]} scales per row of {columns} columns in groups of {size or columns}"
    if any(item is not None and not item.is_contiguous() for item in (weight, scale, zero)):
        return "codes, scales or zero points are not contiguous"
    types = {0: CODES[format], 2: torch.int8, 3: torch.int64}
    return typed_otherwise(args, types) or one_of(scale.dtype, FLOATS, "scales")


PACKED_EMBEDDING = implement("packed_embedding", accepts, tolerance=0.0, module="lookup.launch")
"""The rows of some tokens, dequantized, in one launch."""
