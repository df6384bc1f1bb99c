"""Calls that check a value instead of computing one."""

from __future__ import annotations

import torch

ASSERTS = frozenset((torch.ops.aten._assert_tensor_metadata.default,))
"""torch.export puts one behind each cast: it repeats what the fake values say, and reads what nothing else may read."""


def is_assert(target: object) -> bool:
    """Whether a node's target only checks: its argument is not read by it, and it may be left out."""
    return target in ASSERTS
