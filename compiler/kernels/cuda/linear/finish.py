"""What comes behind a product that cuBLAS computed: activation, the product with the up half, the residual."""

from __future__ import annotations

import triton
import triton.language as tl

from optc.compiler.kernels.cuda.primitives import activate, wait_for_producer


@triton.jit
def finish_rows(
    product, residual, y, N, ACTIVATION: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """y [M, N] = activation(gate) [* up] + residual, in float32; product is [M, N], with GATED [M, 2 N]."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < N
    product += row * N * (2 if GATED else 1)
    wait_for_producer(PDL)
    value = activate(tl.load(product + columns, mask=inside, other=0.0).to(tl.float32), ACTIVATION)
    if GATED:
        value *= tl.load(product + N + columns, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        value += tl.load(residual + row * N + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * N + columns, value.to(y.dtype.element_ty), mask=inside)
