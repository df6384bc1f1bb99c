"""Writes linears in the GPTQ layout, which is described in `optc.compiler.formats.layouts.gptq`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optc.compiler.formats.layouts.gptq import METHOD, V1, V2
from optc.compiler.formats.layouts.joined import joined_names
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
from optc.compiler.version import version


@dataclass(frozen=True)
class GptqWriter:
    """GPTQ's layout. Zero points are kept minus one ("gptq") unless `exact_zero` ("gptq_v2"): a zero point of 0 has
    no code minus one that all readers take alike."""

    exact_zero: bool = False
    name: str = METHOD
    remedy: str = REMEDY

    def obstacle(self, weight: QuantizedWeight) -> str | None:
        scheme, (rows, columns) = weight.scheme, weight.shape
        if reason := foreign(weight):
            return reason
        if scheme.format != "int" or scheme.activations:
            return "it holds integer weights only, with unquantized activations"
        step = 32 // scheme.bits if 32 % scheme.bits == 0 else 32
        if rows % step or columns % step:
            return f"[{rows}, {columns}] does not fill words of {scheme.bits}-bit codes (multiples of {step})"
        return scale_obstacle(weight)

    def tensors(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        bits, columns = weight.scheme.bits, weight.shape[1]
        zero = zero_points(weight) - (0 if self.exact_zero else 1)
        groups = torch.arange(columns) // (weight.scheme.group_size or columns)
        return {
            "qweight": pack_words(weight.codes, bits).t().contiguous(),
            "qzeros": pack_words(zero.t().contiguous(), bits),
            "scales": weight.scale.t().to(torch.float16).contiguous(),
            "g_idx": groups.to(torch.int32),
        }

    def key_values(
        self, scheme: KeyValueScheme, scales: Mapping[str, tuple[Tensor, Tensor]]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        raise no_key_values(self.name, scales)

    def config(self, schemes: Mapping[str, Scheme], linears: Iterable[str], head: str = "") -> dict[str, Any]:
        scheme = one_setting(self.name, schemes)
        layout = V2 if self.exact_zero else V1
        linears = list(linears)
        left = [module for module in linears if module not in schemes]
        left += [name for name, parts in joined_names(linears) if schemes.keys().isdisjoint(parts)]
        return {
            "quant_method": self.name,
            "bits": scheme.bits,
            "group_size": scheme.group_size or -1,
            "desc_act": False,
            "sym": scheme.symmetric,
            "lm_head": head in schemes,  # vLLM takes the head to be unquantized unless this says otherwise
            "checkpoint_format": layout,
            "format": layout,
            "pack_dtype": "int32",
            # GPTQModel's and vLLM's way to name linears that stay as they are; vLLM looks for those that it joins by one name.
            "dynamic": {f"-:^{re.escape(module)}$": {} for module in left},
            "meta": {"quantizer": [f"optc:{version()}"]},
        }


def keeps_exact_zeros(weights: Sequence[QuantizedWeight]) -> bool:
    """Whether zero points must be kept as they are: one of them is 0."""
    return any(bool((item.zero == 0).any()) for item in weights if item.zero is not None)
