"""Writes linears in FP8 blocks, a layout which is described in `optc.compiler.formats.layouts.fp8_blocks`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optc.compiler.formats.layouts.blocks import BLOCKS, block_obstacle, scales_of_blocks
from optc.compiler.formats.layouts.fp8_blocks import METHOD, PARTS
from optc.compiler.formats.layouts.key_values import KeyValueScheme
from optc.compiler.formats.layouts.weight import QuantizedWeight, Scheme
from optc.compiler.formats.layouts.writing import foreign, no_key_values


@dataclass(frozen=True)
class Fp8BlocksWriter:
    """DeepSeek-V3's layout; scales are float32 numbers."""

    name: str = METHOD
    remedy: str = "use --quant fp8-block, or --layout compressed-tensors"

    def obstacle(self, weight: QuantizedWeight) -> str | None:
        if weight.scheme.format != "fp8":
            return "it holds fp8 weights only"
        return foreign(weight) or block_obstacle(weight)

    def tensors(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        return dict(zip(PARTS, (weight.codes, scales_of_blocks(weight).to(torch.float32)), strict=True))

    def key_values(
        self, scheme: KeyValueScheme, scales: Mapping[str, tuple[Tensor, Tensor]]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        raise no_key_values(self.name, scales)

    def config(self, schemes: Mapping[str, Scheme], linears: Iterable[str], head: str = "") -> dict[str, Any]:
        return {
            "quant_method": self.name,
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": BLOCKS,
            "modules_to_not_convert": [module for module in linears if module not in schemes],
        }
