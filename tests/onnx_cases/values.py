"""Random tensors for the cases of the exporter; axis 0 is the dynamic batch of 3."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Case = tuple[Callable[..., Any], *tuple[Tensor, ...]]
Cases = dict[str, list[Case]]

F32, I32, I64 = torch.float32, torch.int32, torch.int64
_generator = torch.Generator().manual_seed(0)


def f(*shape: int, low: float = -3.0, high: float = 3.0) -> Tensor:
    return torch.rand(shape or (3, 4), generator=_generator) * (high - low) + low


def i(*shape: int, low: int = -7, high: int = 8, dtype: torch.dtype = I64) -> Tensor:
    return torch.randint(low, high, shape or (3, 4), generator=_generator).to(dtype)


def b(*shape: int) -> Tensor:
    return torch.rand(shape or (3, 4), generator=_generator) < 0.5


def distinct(*shape: int) -> Tensor:
    """Floats without ties, so that orders are unique."""
    return torch.randperm(int(torch.Size(shape).numel()), generator=_generator).reshape(shape).float() - 5


def grown(x: Tensor) -> Tensor:
    """x with five more rows, so that a dynamic slice has no size that torch.export would specialize on."""
    return torch.cat([x, x.new_ones((5, x.shape[1]))])
