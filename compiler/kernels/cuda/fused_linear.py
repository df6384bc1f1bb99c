"""The kernel of `fused_linear` on CUDA: which calls it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from optc.compiler.kernels.cuda.dispatch import FLOATS, implement
from optc.compiler.kernels.kernel import one_of
from optc.compiler.ops.packed.cuda import ACTIVATIONS, NORMS

CODES = {"int8": torch.int8, "int4": torch.uint8, "fp8": torch.float8_e4m3fn}
GROUPS = {"int8": (32, 64, 128), "int4": (32, 64, 128)}
COLUMN_MULTIPLE = 32
MOST_COLUMNS = 1 << 15
"""Loops over the columns of floats are unrolled."""


def accepts(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """See `obstacle`."""
    x, weight, scale = args[:3]
    return obstacle(
        x.dtype,
        columns=x.shape[-1],
        weight=weight.dtype,
        format=kwargs.get("format", ""),
        group_size=kwargs.get("group_size", 0),
        scales_per_row=1 if scale is None else scale.shape[1],
        norm=kwargs.get("norm", ""),
        activation=kwargs.get("activation", ""),
        inputs=kwargs.get("inputs", ""),
    )


def obstacle(
    dtype: torch.dtype,
    *,
    columns: int,
    weight: torch.dtype,
    format: str,
    group_size: int,
    scales_per_row: int,
    norm: str,
    activation: str,
    inputs: str = "",
) -> str | None:
    """Why there is no kernel for such a linear, or None.

    Args:
        dtype: of the tokens. columns: K. weight: type of its elements. The others as `fused_linear` has them.
    """
    if norm not in NORMS or activation not in ACTIVATIONS:
        return f"no kernel has the norm '{norm}' or the activation '{activation}'"
    if inputs and (inputs, format) != ("fp8", "fp8"):
        return f"tokens rounded to '{inputs}' for a weight of the format '{format}'; the kernel takes fp8 for fp8"
    if columns % COLUMN_MULTIPLE or columns > MOST_COLUMNS:
        return f"{columns} columns; the kernel takes multiples of {COLUMN_MULTIPLE} up to {MOST_COLUMNS}"
    if format and format not in CODES:
        return f"weights of the format '{format}'; the kernel takes {', '.join(CODES)}"
    expected = CODES.get(format, dtype)
    if weight is not expected:
        return f"a weight of type {_name(weight)} for the format '{format}', which holds {_name(expected)}"
    size = 0 if group_size == columns else group_size
    if size and size not in GROUPS.get(format, ()):
        allowed = ", ".join(map(str, GROUPS.get(format, ())))
        return f"groups of {size} columns; {format or 'a weight without a format'} has {allowed or 'none'}"
    if format and scales_per_row != (columns // size if size else 1):
        return f"{scales_per_row} scales per row of {columns} columns in groups of {size or columns}"
    return one_of(dtype, FLOATS, "activations")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


FUSED_LINEAR = implement(
    "fused_linear",
    accepts,
    tolerance=1e-3,  # of products, whose tokens have one scale each; a GEMV is closer
    module="linear.launch",
    configurations=("configurations.json",),
)
