"""`linear_nbits` on the CPU: products with weights of 2, 3, 4 and 8 bits in tiles of 16 rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from optc.compiler.kernels.kernel import CppSources, Kernel, Loop, one_of, register
from optc.compiler.ops.packed.inductor_cpu import KEPT, segment_size

BITS = (2, 3, 4, 8)
LONGEST_SUM = 65536
"""Products of 8-bit codes that a sum in 32 bits holds."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def accepts(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """See `obstacle`."""
    table = args[5]
    return obstacle(
        args[0].dtype,
        bits=kwargs["bits"],
        columns=kwargs["K"],
        group_size=kwargs["group_size"],
        activation_group=kwargs["activation_group"],
        codebook=table is not None,
    )


def obstacle(
    dtype: torch.dtype, *, bits: int, columns: int, group_size: int, activation_group: int, codebook: bool
) -> str | None:
    """Why the kernel has no product for such a weight and activations, or None.

    Args:
        dtype: of activations. columns: K of the weight.
        codebook: codes stand for the values of a table.
    """
    if bits not in BITS:
        return f"{bits}-bit codes have no packed product ({', '.join(map(str, BITS))} have)"
    if codebook and (bits == max(BITS) or activation_group != KEPT):
        return "a codebook has a packed product up to 4 bits only, and with unrounded activations only"
    if activation_group != KEPT and segment_size(columns, group_size, activation_group) > LONGEST_SUM:
        return f"sums of {columns} products do not fit in 32 bits"
    return one_of(dtype, DTYPES, "activations")


LINEAR_NBITS = register(
    Kernel(
        op="linear_nbits",
        device="cpu",
        accepts=accepts,
        tolerance=3e-6,
        sources=CppSources(
            package="optc.compiler.kernels.cpu",
            op="linear_nbits",
            headers=("torch_headers.h", "nbits.h", "nbits_lanes.h", "nbits_matrix.h"),
            loops=(
                # Unrolled by hand: -O3 is no faster.
                Loop(
                    stem="nbits",
                    macro="OPTC_NBITS",
                    optimization="-O2",
                    levels=("baseline", "avx2", "avx512"),
                ),
                Loop(stem="nbits_matrix", macro="OPTC_NBITS_MATRIX", optimization="-O2", levels=("amx",)),
            ),
        ),
        libraries=("torch",),
    )
)
