"""Rotation of channels in blocks, for inputs that are easier to round turned."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from optc.compiler.ops.library import define


def hadamard_signs(size: int) -> Tensor:
    """The Hadamard matrix of Sylvester, [size, size] float64 of 1 and -1, its own transpose; `size` is a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    assert len(matrix) == size, f"{size} is no power of two"
    return matrix


def hadamard(size: int) -> Tensor:
    """The same, orthonormal: divided by sqrt(size)."""
    return hadamard_signs(size) / math.sqrt(size)


def _rotate_blocks(x: Tensor, matrix: Tensor) -> Tensor:
    """Each run of n neighbours of the last axis of x [..., K] times `matrix` [n, n]; n divides K."""
    blocks = x.unflatten(-1, (x.shape[-1] // matrix.shape[0], matrix.shape[0]))
    return torch.matmul(blocks, matrix).flatten(-2)


define(
    "rotate_blocks(Tensor x, Tensor matrix) -> Tensor",
    _rotate_blocks,
    lambda x, _matrix: torch.empty_like(x, memory_format=torch.contiguous_format),
    aten=_rotate_blocks,
)
