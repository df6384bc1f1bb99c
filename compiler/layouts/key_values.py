"""Scales of an attention's keys and values, as model folders keep them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

ValueFormat = Literal["int8", "fp8"]


@dataclass(frozen=True)
class KeyValueScheme:
    """How the keys (after the rotary embedding) and values of every attention are rounded; scales are fixed.

    Attributes:
        granularity: one scale per layer, or per key/value head.
    """

    format: ValueFormat
    granularity: Literal["layer", "head"]


@dataclass(frozen=True)
class KeyValueScales:
    """value = code * scale, as `optc.quantize` and `optc.dequantize_activation` have it.

    Attributes:
        key, value: float32 [1], or [Hkv, 1, 1] per head: they broadcast to [B, Hkv, S, D].
    """

    scheme: KeyValueScheme
    key: Tensor
    value: Tensor
