"""Writes linears in the AWQ layout, which is described in `optc.compiler.formats.layouts.awq`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optc.compiler.formats.layouts.awq import BITS, METHOD, ORDER
from optc.compiler.formats.layouts.key_values import KeyValueScheme
from optc.compiler.formats.layouts.weight import QuantizedWeight, Scheme
from optc.compiler.formats.layouts.words import pack_words
from optc.compiler.formats.layouts.writing import (
    REMEDY,
    foreign,
    no_key_values,
    one_setting,
    scale_obstacle,
    zero_points,
)
from optc.compiler.ir.lazy_weights import materialized


@dataclass(frozen=True)
class AwqWriter:
    """AutoAWQ's GEMM layout. Symmetric weights get zero points of the middle code: the kernels read them anyway."""

    name: str = METHOD
    remedy: str = REMEDY

    def obstacle(self, weight: QuantizedWeight) -> str | None:
        scheme = weight.scheme
        if reason := foreign(weight):
            return reason
        if scheme.format != "int" or scheme.bits != BITS or scheme.activations:
            return "it holds 4-bit integer weights only, with unquantized activations"
        if weight.shape[0] % 8:
            return f"its N = {weight.shape[0]} is not a multiple of 8"
        return scale_obstacle(weight)

    def tensors(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        return {
            "qweight": pack_nibbles(weight.codes),
            "qzeros": pack_nibbles(zero_points(weight)),
            "scales": weight.scale.t().to(torch.float16).contiguous(),
        }

    def key_values(
        self, scheme: KeyValueScheme, scales: Mapping[str, tuple[Tensor, Tensor]]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        raise no_key_values(self.name, scales)

    def config(self, schemes: Mapping[str, Scheme], linears: Iterable[str], head: str = "") -> dict[str, Any]:
        scheme = one_setting(self.name, schemes)
        return {
            "quant_method": self.name,
            "version": "gemm",
            "bits": scheme.bits,
            "group_size": scheme.group_size or -1,
            "zero_point": True,
            "lm_head": head in schemes,  # vLLM takes the head to be unquantized unless this says otherwise
            "modules_to_not_convert": [module for module in linears if module not in schemes],
        }


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 [N, R] below 16 -> int32 [R, N / 8], the nibbles in AWQ's order."""
    rows = materialized(codes).t().contiguous().unflatten(1, (-1, len(ORDER)))
    return pack_words(rows.index_select(-1, torch.tensor(ORDER, device=rows.device)).flatten(1), BITS)
