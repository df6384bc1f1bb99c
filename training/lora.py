"""LoRA adapters by peft, on a plain base or on one in 4-bit NF4 (QLoRA)."""

from __future__ import annotations

from typing import Literal

import msgspec
from torch import nn


class LoraConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Low-rank adapters (Hu et al. 2021, https://arxiv.org/abs/2106.09685) and the form of the frozen base.

    Attributes:
        enabled: False leaves the model as it is.
        rank: columns of the two factors.
        alpha: the product is scaled by alpha / rank.
        dropout: probability, on the adapters' inputs.
        targets: names of modules, as their last parts (`q_proj`); empty: every linear but the head.
        base: "dense" as loaded; "nf4" in 4-bit NF4 (QLoRA, Dettmers et al. 2023).
        group_size: neighbours along K that share an NF4 scale.
        double_quant: keep the NF4 scales in 8 bits.
        export: "merge" writes one plain model folder; "adapters" writes peft's adapter folder.
    """

    enabled: bool = False
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    base: Literal["dense", "nf4"] = "dense"
    group_size: int = 64
    double_quant: bool = True
    export: Literal["merge", "adapters"] = "merge"


def apply_lora(model: nn.Module, config: LoraConfig) -> nn.Module:
    """Freeze a model, in place, and give its linears adapters; returns the model."""
    if not config.enabled:
        return model
    raise NotImplementedError
