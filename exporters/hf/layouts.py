"""The layouts that quantized weights are written in: what each can hold, its tensors and its config.

Sources and shapes: `optc.compiler.formats.layouts`, which reads what is written here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from optc.compiler.diagnostics import TargetError
from optc.compiler.formats.layouts import QuantizedWeight, Scheme, awq, compressed_tensors, gptq
from optc.compiler.formats.layouts.key_values import KeyValueScheme
from optc.compiler.version import version
from optc.exporters.hf.words import pack_words

LAYOUTS = (compressed_tensors.METHOD, awq.METHOD, gptq.METHOD)
_REMEDY = f"choose another of --layout {', '.join(LAYOUTS)}, or other quantization options"


class LayoutWriter(Protocol):
    """One layout."""

    @property
    def name(self) -> str:
        """As `--layout` calls it."""

    @property
    def remedy(self) -> str:
        """What to do about a weight that cannot be written."""

    def obstacle(self, weight: QuantizedWeight) -> str | None:
        """Why a weight cannot be written, or None."""

    def tensors(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """What is written for a weight: name behind the module's -> tensor."""

    def config(self, schemes: Mapping[str, Scheme], linears: Iterable[str]) -> dict[str, Any]:
        """quantization_config.

        Args:
            schemes: quantized linear -> its scheme.
            linears: all linears of the model.

        Raises:
            TargetError: the layout cannot name this mixture.
        """

    def key_values(
        self, scheme: KeyValueScheme, scales: Mapping[str, tuple[Tensor, Tensor]]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What quantization_config says of rounded keys and values, and the tensors of their scales by name.

        Args:
            scales: attention module -> scales of its keys and values, float32 [1] or [Hkv, 1, 1].

        Raises:
            TargetError: the layout has no place for them.
        """


@dataclass(frozen=True)
class CompressedTensorsWriter:
    """compressed-tensors: pack-quantized, int-quantized (W8A8) and float-quantized (fp8).

    Attributes:
        bits: of integer weights: 4 and 8 for vLLM; the layout itself, and optc, take 2 and 3 too.
    """

    name: str = compressed_tensors.METHOD
    remedy: str = _REMEDY
    bits: tuple[int, ...] = (4, 8)

    def obstacle(self, weight: QuantizedWeight) -> str | None:
        scheme = weight.scheme
        if foreign := _foreign(weight):
            return foreign
        if scheme.format == "int" and scheme.bits not in self.bits:
            return f"{scheme.bits}-bit weights: vLLM runs 4 and 8 bits in this layout; use --layout gptq"
        if scheme.activations == "fp8" and scheme.format != "fp8":
            return "integer weights with fp8 activations"
        if scheme.activations == "int8" and scheme.format != "int":
            return "fp8 weights with int8 activations"
        if scheme.format == "fp8" and scheme.group_size:
            return "fp8 weights in groups: the layout has one scale per channel, or for the whole weight"
        if scheme.activations and (scheme.bits != 8 or scheme.group_size or not scheme.symmetric):
            return "quantized activations with weights other than symmetric 8-bit ones, one scale per channel"
        return None

    def tensors(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        scheme = weight.scheme
        if scheme.format == "fp8":
            scale = weight.scale.reshape(1) if scheme.per_tensor else weight.scale
            return {"weight": weight.codes, "weight_scale": scale}
        if scheme.activations:
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

    def config(self, schemes: Mapping[str, Scheme], linears: Iterable[str]) -> dict[str, Any]:
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
        }

    def key_values(
        self, scheme: KeyValueScheme, scales: Mapping[str, tuple[Tensor, Tensor]]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        strategy = next(
            name for name, one in compressed_tensors.STRATEGIES.items() if one == scheme.granularity
        )
        kind = "int" if scheme.format == "int8" else "float"
        form = {"num_bits": 8, "type": kind, "symmetric": True, "strategy": strategy, "group_size": None,
                "dynamic": False, "actorder": None, "block_structure": None}  # fmt: skip
        return {"kv_cache_scheme": form}, named_scales(scales, compressed_tensors.KEY_VALUE_PARTS)


def _whole_format(formats: set[str]) -> str:
    if len(formats) > 1:
        return "mixed-precision"
    return next(iter(formats), compressed_tensors.DENSE)


def _format(scheme: Scheme) -> str:
    if scheme.format == "fp8":
        return compressed_tensors.FLOAT
    return compressed_tensors.INT if scheme.activations else compressed_tensors.PACKED


def _weights(scheme: Scheme) -> dict[str, Any]:
    strategy = "tensor" if scheme.per_tensor else "group" if scheme.group_size else "channel"
    return {
        "num_bits": scheme.bits,
        "type": "int" if scheme.format == "int" else "float",
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
    kind = "int" if scheme.activations == "int8" else "float"
    return {"num_bits": 8, "type": kind, "symmetric": True, "strategy": "token", "group_size": None,
            "dynamic": True, "actorder": None, "block_structure": None}  # fmt: skip


@dataclass(frozen=True)
class AwqWriter:
    """AutoAWQ's GEMM layout. Symmetric weights get zero points of the middle code: the kernels read them anyway."""

    name: str = awq.METHOD
    remedy: str = _REMEDY

    def obstacle(self, weight: QuantizedWeight) -> str | None:
        scheme = weight.scheme
        if foreign := _foreign(weight):
            return foreign
        if scheme.format != "int" or scheme.bits != awq.BITS or scheme.activations:
            return "it holds 4-bit integer weights only, with unquantized activations"
        if weight.shape[0] % 8:
            return f"its N = {weight.shape[0]} is not a multiple of 8"
        return _scale_obstacle(weight)

    def tensors(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        return {
            "qweight": pack_nibbles(weight.codes),
            "qzeros": pack_nibbles(_zero(weight)),
            "scales": weight.scale.t().to(torch.float16).contiguous(),
        }

    def key_values(
        self, scheme: KeyValueScheme, scales: Mapping[str, tuple[Tensor, Tensor]]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        raise _no_key_values(self.name, scales)

    def config(self, schemes: Mapping[str, Scheme], linears: Iterable[str]) -> dict[str, Any]:
        scheme = _only(self.name, schemes)
        return {
            "quant_method": self.name,
            "version": "gemm",
            "bits": scheme.bits,
            "group_size": scheme.group_size or -1,
            "zero_point": True,
            "modules_to_not_convert": [module for module in linears if module not in schemes],
        }


@dataclass(frozen=True)
class GptqWriter:
    """GPTQ's layout. Zero points are kept minus one ("gptq") unless `exact_zero` ("gptq_v2"): a zero point of 0 has
    no code minus one that all readers take alike."""

    exact_zero: bool = False
    name: str = gptq.METHOD
    remedy: str = _REMEDY

    def obstacle(self, weight: QuantizedWeight) -> str | None:
        scheme, (rows, columns) = weight.scheme, weight.shape
        if foreign := _foreign(weight):
            return foreign
        if scheme.format != "int" or scheme.activations:
            return "it holds integer weights only, with unquantized activations"
        step = 32 // scheme.bits if 32 % scheme.bits == 0 else 32
        if rows % step or columns % step:
            return f"[{rows}, {columns}] does not fill words of {scheme.bits}-bit codes (multiples of {step})"
        return _scale_obstacle(weight)

    def tensors(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        bits, columns = weight.scheme.bits, weight.shape[1]
        zero = _zero(weight) - (0 if self.exact_zero else 1)
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
        raise _no_key_values(self.name, scales)

    def config(self, schemes: Mapping[str, Scheme], linears: Iterable[str]) -> dict[str, Any]:
        scheme = _only(self.name, schemes)
        layout = gptq.V2 if self.exact_zero else gptq.V1
        left = [module for module in linears if module not in schemes]
        return {
            "quant_method": self.name,
            "bits": scheme.bits,
            "group_size": scheme.group_size or -1,
            "desc_act": False,
            "sym": scheme.symmetric,
            "lm_head": False,
            "checkpoint_format": layout,
            "format": layout,
            "pack_dtype": "int32",
            # GPTQModel's and vLLM's way to name linears that stay as they are.
            "dynamic": {f"-:^{re.escape(module)}$": {} for module in left},
            "meta": {"quantizer": [f"optc:{version()}"]},
        }


def layout_writer(name: str, weights: Sequence[QuantizedWeight]) -> LayoutWriter:
    """The writer for a layout, fit for these weights."""
    if name == awq.METHOD:
        return AwqWriter()
    if name == gptq.METHOD:
        return GptqWriter(any(bool((item.zero == 0).any()) for item in weights if item.zero is not None))
    assert name == compressed_tensors.METHOD, name
    return CompressedTensorsWriter()


def named_scales(scales: Mapping[str, tuple[Tensor, Tensor]], parts: tuple[str, str]) -> dict[str, Tensor]:
    """Tensor name -> scale, of an attention's keys and values."""
    return {
        f"{module}.{part}": scale
        for module, pair in scales.items()
        for part, scale in zip(parts, pair, strict=True)
    }


def pack_nibbles(codes: Tensor) -> Tensor:
    """uint8 [N, R] below 16 -> int32 [R, N / 8], the nibbles in AWQ's order."""
    wide = codes.t().to(torch.int32).reshape(codes.shape[1], -1, len(awq.ORDER))
    out = torch.zeros(wide.shape[:2], dtype=torch.int32)
    for place, column in enumerate(awq.ORDER):
        out |= wide[..., column] << (awq.BITS * place)
    return out


def _foreign(weight: QuantizedWeight) -> str | None:
    """What only ModelOpt's layout holds, or None."""
    if weight.scheme.format == "nvfp4":
        return "nvfp4 weights; use --target trtllm"
    if weight.scheme.static:
        return "its input has a calibrated scale, and the layout has scales per token"
    return "its input is multiplied by a factor of its own" if weight.input_factor is not None else None


def _zero(weight: QuantizedWeight) -> Tensor:
    """Zero points uint8 [N, G]; the middle code where the weight has none."""
    if weight.zero is not None:
        return weight.zero
    return torch.full_like(weight.scale, 2 ** (weight.scheme.bits - 1), dtype=torch.uint8)


def _scale_obstacle(weight: QuantizedWeight) -> str | None:
    half = weight.scale.to(torch.float16)
    if torch.equal(half.to(weight.scale.dtype), weight.scale):
        return None
    return "its scales are not float16 numbers, which the layout keeps: run the pass round-scales after quantization"


def _no_key_values(layout: str, scales: Iterable[str]) -> TargetError:
    return TargetError(
        f"the layout '{layout}' has no place for the scales of keys and values", where=next(iter(scales)),
        remedy="use --layout compressed-tensors",
    )  # fmt: skip


def _only(layout: str, schemes: Mapping[str, Scheme]) -> Scheme:
    kinds = {(scheme.bits, scheme.group_size, scheme.symmetric): scheme for scheme in schemes.values()}
    if len({(bits, size) for bits, size, _ in kinds}) == 1:
        return min(kinds.values(), key=lambda scheme: scheme.symmetric)
    raise TargetError(
        f"the layout '{layout}' has one setting for all linears",
        why=f"{len(kinds)} are requested: " + ", ".join(f"{bits} bits g{size}" for bits, size, _ in kinds),
        remedy="use --layout compressed-tensors",
    )
