"""Quantization-aware training: linears that round their weights, inputs, keys and values as the compiled program will."""

from __future__ import annotations

from typing import Literal

import msgspec
from torch import nn


class QatConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is rounded while training, and how its scales are found.

    Attributes:
        enabled: False leaves the model as it is.
        bits: of the weights: 2, 3, 4 or 8.
        group_size: neighbours along K that share a scale; 0 is a whole row.
        symmetric: no zero points.
        scales: "learned" trains the step sizes with the weights (LSQ); "minmax" takes them from the largest
            weight of each group, in every step again.
        start: where learned scales begin: "search" shrinks each group's range to the least squared error, "full"
            takes the largest weight.
        scale_rate: relative change of a learned scale per unit of learning rate: Adam at learning rate lr
            changes scales by about scale_rate * lr of themselves in a step.
        activations: "int8" rounds the inputs of quantized linears, one scale per token (W8A8; needs bits=8,
            group_size=0, symmetric).
        kv_cache: "int8" rounds keys and values, with scales from the largest magnitudes seen in training.
        kv_granularity: one KV scale per "layer" or per "head".
        ignore: patterns (`*.down_proj.*`) of weight names that stay as they are.
        head: quantize the linear that makes the logits too.
    """

    enabled: bool = False
    bits: int = 4
    group_size: int = 32
    symmetric: bool = True
    scales: Literal["learned", "minmax"] = "learned"
    start: Literal["search", "full"] = "search"
    scale_rate: float = 1.0
    activations: Literal["none", "int8"] = "none"
    kv_cache: Literal["none", "int8"] = "none"
    kv_granularity: Literal["layer", "head"] = "head"
    ignore: tuple[str, ...] = ()
    head: bool = False


def apply_qat(model: nn.Module, config: QatConfig) -> nn.Module:
    """Replace the linears of a model, in place, by ones that fake-quantize; returns the model."""
    if not config.enabled:
        return model
    raise NotImplementedError
