"""Orthogonal matrices that spread outliers: Hadamard's, and what comes next to them where sizes are no powers of two."""

from __future__ import annotations

import torch
from torch import Tensor

from optc.compiler.ops.dialect.rotation import hadamard


def random_rotation(size: int, seed: int) -> Tensor:
    """A random orthogonal matrix [size, size] float64: random signs, then a Hadamard matrix as far as it goes.

    `size` is n times a power of two p: the matrix is the Kronecker product of a uniformly random rotation of n (Stewart
    1980, by a QR decomposition) and Hadamard's of p. Every entry is +-1/sqrt(size) where n is 1, as QuaRot has it
    (Ashkboos et al. 2024, https://arxiv.org/abs/2404.00456).
    """
    generator = torch.Generator().manual_seed(seed)
    power = size & -size
    factor, upper = torch.linalg.qr(torch.randn(size // power, size // power, generator=generator, dtype=torch.float64))
    factor = (factor * upper.diagonal().sign()).contiguous()
    signs = torch.randint(2, (size,), generator=generator).double() * 2 - 1
    return signs[:, None] * torch.kron(factor, hadamard(power))


def turned(weight: Tensor, axis: int, matrix: Tensor, scale: Tensor | None = None) -> Tensor:
    """`weight` with its channels along `axis` multiplied by `scale`, then by `matrix`; in the type of the weight.

    Args:
        weight: any shape. matrix: [D, D] float64, D the size of `axis`. scale: [D] or None.
    """
    matrix = matrix.to(weight.device)
    if scale is not None:
        matrix = scale.to(matrix)[:, None] * matrix
    last = weight.detach().movedim(axis, -1)
    rows = last.reshape(-1, len(matrix))
    done = torch.cat([(piece.double() @ matrix).to(weight.dtype) for piece in rows.split(_ROWS)])
    return done.reshape(last.shape).movedim(-1, axis).contiguous()


_ROWS = 1 << 14
"""Rows in double precision at a time."""
