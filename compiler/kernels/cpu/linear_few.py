"""`linear_few` on the CPU: products in float32 that read a weight once for up to twenty rows of activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from optc.compiler.kernels.kernel import CppSources, Kernel, Loop, one_of, register


def accepts(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """float32 for activations and weight."""
    return one_of(args[0].dtype, (torch.float32,), "activations") or one_of(args[1].dtype, (torch.float32,), "weights")


LINEAR_FEW = register(
    Kernel(
        op="linear_few",
        device="cpu",
        accepts=accepts,
        tolerance=3e-6,
        sources=CppSources(
            package="optc.compiler.kernels.cpu",
            op="linear_few",
            headers=("torch_headers.h", "few.h"),
            loops=(Loop(stem="few", macro="OPTC_FEW", optimization="-O3", levels=("baseline", "avx2")),),
        ),
        libraries=("torch",),
    )
)
