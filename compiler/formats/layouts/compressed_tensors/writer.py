"""Writes linears in the compressed-tensors layout, which is described in `optc.compiler.formats.layouts.compressed_tensors`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from optc.compiler.formats.layouts.blocks import BLOCKS, block_obstacle, scales_of_blocks
from optc.compiler.formats.layouts.compressed_tensors import (
    DENSE,
    FLOAT,
    FLOAT4,
    INT,
    KEY_VALUE_PARTS,
    METHOD,
    MX_FLOAT4,
    PACKED,
    STRATEGIES,
    TRANSFORM,
    TRANSFORM_PART,
    W4A8_GROUP,
)
from optc.compiler.formats.layouts.key_values import KeyValueScheme
from optc.compiler.formats.layouts.weight import QuantizedWeight, Scheme
from optc.compiler.formats.layouts.words import pack_words
from optc.compiler.formats.layouts.writing import (
    REMEDY,
    named_scales,
    unlike_integers,
)
from optc.compiler.formats.weight_format import weight_format
from optc.compiler.ops.dialect.mxfp4 import BLOCK as MX_BLOCK
from optc.compiler.ops.dialect.nvfp4 import BLOCK
from optc.compiler.ops.dialect.quantization import FP8_BLOCK
from optc.compiler.ops.dialect.rotation import hadamard_signs

_FLOAT4_WEIGHTS: dict[str, Any] = {
    "num_bits": 4,
    "type": "float",
    "symmetric": True,
    "strategy": "tensor_group",
    "group_size": BLOCK,
    "dynamic": False,
    "actorder": None,
    "block_structure": None,
    "scale_dtype": "torch.float8_e4m3fn",
    "zp_dtype": "torch.float8_e4m3fn",
}
_MX_FLOAT4_WEIGHTS: dict[str, Any] = {
    **_FLOAT4_WEIGHTS,
    "strategy": "group",
    "group_size": MX_BLOCK,
    "scale_dtype": "torch.uint8",
    "zp_dtype": "torch.uint8",
}
_BLOCK_WEIGHTS: dict[str, Any] = {
    "num_bits": 8,
    "type": "float",
    "symmetric": True,
    "strategy": "block",
    "group_size": None,
    "dynamic": False,
    "actorder": None,
    "block_structure": BLOCKS,
}


@dataclass(frozen=True)
class CompressedTensorsWriter:
    """compressed-tensors: pack-quantized, int-quantized (W8A8), float-quantized (fp8), nvfp4- and mxfp4-pack-quantized.

    Attributes:
        bits: of integer weights: 4 and 8 for vLLM; the layout itself, and optc, take 2 and 3 too.
    """

    name: str = METHOD
    remedy: str = REMEDY
    bits: tuple[int, ...] = (4, 8)

    def obstacle(self, weight: QuantizedWeight) -> str | None:
        scheme = weight.scheme
        if scheme.format in ("nvfp4", "mxfp4"):
            return _float4_obstacle(weight)
        if reason := unlike_integers(weight):
            return reason
        if scheme.format == "int" and scheme.bits not in self.bits:
            return f"{scheme.bits}-bit weights: vLLM runs 4 and 8 bits in this layout; use --layout gptq"
        if scheme.format == "fp8" and scheme.group_size:
            return block_obstacle(weight)
        if scheme.activations == "fp8" and scheme.format == "int" and scheme.bits == 4:
            return _w4a8_obstacle(scheme)
        if scheme.activations in ("fp8", "fp8-128") and scheme.format != "fp8":
            return f"{scheme.bits}-bit integer weights with {scheme.activations} activations"
        if scheme.activations == "int8" and scheme.format != "int":
            return "fp8 weights with int8 activations"
        if scheme.activations and (scheme.bits != 8 or scheme.group_size or not scheme.symmetric):
            return "quantized activations with weights other than symmetric 8-bit ones, one scale per channel"
        return None

    def tensors(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        turn = weight.scheme.rotation
        name = TRANSFORM_PART.format(TRANSFORM.format(turn))
        more = {name: hadamard_signs(turn).to(weight.scale.dtype)} if turn else {}
        return self._stored(weight) | more

    def _stored(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        scheme = weight.scheme
        if scheme.format in ("nvfp4", "mxfp4"):
            return _float4_tensors(weight)
        if scheme.format == "fp8":
            scale = weight.scale.reshape(1) if scheme.per_tensor else weight.scale
            scale = scales_of_blocks(weight) if scheme.group_size else scale
            return {"weight": weight.codes, "weight_scale": scale}
        if _format(scheme) == INT:
            return {
                "weight": (weight.codes.to(torch.int16) - 128).to(torch.int8),
                "weight_scale": weight.scale,
            }
        out = {
            "weight_packed": pack_words(weight.codes, scheme.bits),
            "weight_scale": weight.scale,
            "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
        }
        if weight.zero is not None:
            out["weight_zero_point"] = pack_words(weight.zero.t().contiguous(), scheme.bits).t().contiguous()
        return out

    def config(self, schemes: Mapping[str, Scheme], linears: Iterable[str], head: str = "") -> dict[str, Any]:
        turned = {module: scheme.rotation for module, scheme in schemes.items() if scheme.rotation}
        schemes = {module: replace(scheme, rotation=0) for module, scheme in schemes.items()}
        kinds = list(dict.fromkeys(schemes.values()))
        groups: dict[str, dict[str, Any]] = {}
        for index, kind in enumerate(kinds):
            named = [module for module, scheme in schemes.items() if scheme == kind]
            groups[f"group_{index}"] = {
                "targets": ["Linear"] if len(kinds) == 1 else named,
                "weights": _weights(kind),
                "input_activations": _inputs(kind),
                "output_activations": None,
                "format": _format(kind),
            }
        return {
            "quant_method": self.name,
            "format": _whole_format({group["format"] for group in groups.values()}),
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": [module for module in linears if module not in schemes],
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
            **({"transform_config": _transforms(turned)} if turned else {}),
        }

    def key_values(
        self, scheme: KeyValueScheme, scales: Mapping[str, tuple[Tensor, Tensor]]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        strategy = next(name for name, one in STRATEGIES.items() if one == scheme.granularity)
        kind = "int" if scheme.format == "int8" else "float"
        form = {
            "num_bits": 8,
            "type": kind,
            "symmetric": True,
            "strategy": strategy,
            "group_size": None,
            "dynamic": False,
            "actorder": None,
            "block_structure": None,
        }
        return {"kv_cache_scheme": form}, named_scales(scales, KEY_VALUE_PARTS)


def _transforms(turned: Mapping[str, int]) -> dict[str, Any]:
    """`transform_config` of linears whose inputs are rotated, by the channels of a block."""
    groups = {}
    for size in dict.fromkeys(turned.values()):
        named = [module for module, own in turned.items() if own == size]
        groups[TRANSFORM.format(size)] = {
            "type": "hadamard",
            "apply": [{"targets": named, "location": "input", "inverse": False, "ignore": []}],
            "randomize": False,
            "head_dim": size,
        }
    return {"config_groups": groups}


def _w4a8_obstacle(scheme: Scheme) -> str | None:
    """vLLM's kernel of 4-bit integers and fp8 inputs has one form."""
    if scheme.group_size != W4A8_GROUP or not scheme.symmetric:
        return f"4-bit weights with fp8 activations are symmetric, in groups of {W4A8_GROUP}"
    return None


def _float4_obstacle(weight: QuantizedWeight) -> str | None:
    """The layout keeps the reciprocals of scales, of which most numbers are one, and those of `quantize-nvfp4` all."""
    for scale in (weight.global_scale, weight.input_scale):
        if scale is not None and not torch.equal(1 / (1 / scale.float()), scale.float()):
            return "its scale over all blocks is not the reciprocal of a float32 number, which the layout keeps"
    form = weight.scheme.format
    if weight.scheme.rotation:
        return f"{form} weights with a rotated input, which vLLM computes by another kernel"
    if weight.scheme.activations and (form, weight.scheme.activations) != ("nvfp4", "nvfp4"):
        return f"{form} weights with {weight.scheme.activations} activations"
    return "its input is multiplied by a factor of its own" if weight.input_factor is not None else None


def _float4_tensors(weight: QuantizedWeight) -> dict[str, Tensor]:
    out = {
        "weight_packed": weight.codes[:, 0::2] | (weight.codes[:, 1::2] << 4),
        "weight_scale": weight.scale,
    }
    if weight.global_scale is not None:
        out["weight_global_scale"] = 1 / weight.global_scale.float().reshape(1)
    if weight.input_scale is not None:
        out["input_global_scale"] = 1 / weight.input_scale.float().reshape(1)
    return out


def _whole_format(formats: set[str]) -> str:
    if len(formats) > 1:
        return "mixed-precision"
    return next(iter(formats), DENSE)


def _format(scheme: Scheme) -> str:
    if scheme.format in ("nvfp4", "mxfp4"):
        return FLOAT4 if scheme.format == "nvfp4" else MX_FLOAT4
    if scheme.format == "fp8":
        return FLOAT
    return INT if scheme.activations and scheme.bits == 8 else PACKED


def _weights(scheme: Scheme) -> dict[str, Any]:
    strategy = "tensor" if scheme.per_tensor else "group" if scheme.group_size else "channel"
    if scheme.format == "nvfp4":
        return _FLOAT4_WEIGHTS
    if scheme.format == "mxfp4":
        return _MX_FLOAT4_WEIGHTS
    if scheme.format == "fp8" and scheme.group_size:
        return _BLOCK_WEIGHTS
    return {
        "num_bits": scheme.bits,
        "type": weight_format(scheme.format).kind,
        "symmetric": scheme.symmetric,
        "strategy": strategy,
        "group_size": scheme.group_size or None,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
    }


def _inputs(scheme: Scheme) -> dict[str, Any] | None:
    if not scheme.activations:
        return None
    if scheme.format == "nvfp4":
        return {**_FLOAT4_WEIGHTS, "dynamic": "local"}
    kind = "int" if scheme.activations == "int8" else "float"
    grouped = scheme.activations == "fp8-128"
    return {
        "num_bits": 8,
        "type": kind,
        "symmetric": True,
        "strategy": "group" if grouped else "token",
        "group_size": FP8_BLOCK if grouped else None,
        "dynamic": True,
        "actorder": None,
        "block_structure": None,
    }
