"""Writes linears in the ModelOpt layout, which is described in `optc.compiler.formats.layouts.modelopt`.

config.json and hf_quant_config.json say the same in two forms; TensorRT-LLM reads the latter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optc.compiler.diagnostics import TargetError
from optc.compiler.formats.layouts.key_values import KeyValueScheme
from optc.compiler.formats.layouts.modelopt import (
    AWQ,
    CACHE_FP8,
    FP8,
    GROUP_SIZES,
    INT8,
    KEY_VALUE_PARTS,
    KEY_VALUES,
    METHOD,
    NVFP4,
)
from optc.compiler.formats.layouts.weight import QuantizedWeight, Scheme
from optc.compiler.formats.layouts.writing import (
    named_scales,
)
from optc.compiler.version import version

_FLOAT8: dict[str, Any] = {"dynamic": False, "num_bits": 8, "type": "float"}
_FLOAT4: dict[str, Any] = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}


@dataclass(frozen=True)
class ModelOptWriter:
    """One algorithm for all linears.

    Attributes:
        embeddings: of the model; they are listed with the linears that are left alone.
    """

    embeddings: tuple[str, ...] = ()
    name: str = METHOD
    remedy: str = "choose another --quant, or --target vllm"

    def obstacle(self, weight: QuantizedWeight) -> str | None:
        scheme = weight.scheme
        algorithm = algorithm_of(scheme)
        if algorithm is None:
            return f"the layout has no algorithm for {_described(scheme)}"
        if algorithm == AWQ and scheme.group_size not in GROUP_SIZES:
            return f"groups of {scheme.group_size or 'a row'}: TensorRT-LLM's kernels take 64 and 128"
        if algorithm == AWQ and weight.shape[0] % 2:
            return f"two rows share a byte, and it has {weight.shape[0]}"
        return "its input is rotated at run time; use --target vllm" if scheme.rotation else None

    def tensors(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        algorithm = algorithm_of(weight.scheme)
        codes, scale = weight.codes, weight.scale.float()
        if algorithm == AWQ:
            signed = codes ^ 8  # code - 8 in two's complement, 4 bits
            out = {"weight": signed[0::2] | (signed[1::2] << 4), "weight_scale": scale}
            return out if weight.input_factor is None else {**out, "pre_quant_scale": weight.input_factor}
        if algorithm == INT8:
            return {
                "weight": (codes.to(torch.int16) - 128).to(torch.int8),
                "weight_scale": scale.reshape(-1),
            }
        assert weight.input_scale is not None
        # Linears of one input share its scale in the program; a file has no shared tensors.
        inputs = {"input_scale": weight.input_scale.float().reshape(()).clone()}
        if algorithm == FP8:
            return {"weight": codes, "weight_scale": scale.reshape(()), **inputs}
        assert algorithm == NVFP4
        assert weight.global_scale is not None
        packed = codes[:, 0::2] | (codes[:, 1::2] << 4)
        second = weight.global_scale.float().reshape(())
        return {"weight": packed, "weight_scale": weight.scale, "weight_scale_2": second, **inputs}

    def config(self, schemes: Mapping[str, Scheme], linears: Iterable[str], head: str = "") -> dict[str, Any]:
        """`quantization_config` of config.json."""
        algorithm = _algorithm(schemes)
        groups: dict[str, Any] = {}
        if algorithm in (FP8, NVFP4):
            form = _FLOAT8 if algorithm == FP8 else _FLOAT4
            groups["config_groups"] = {"group_0": {"input_activations": form, "weights": form, "targets": ["Linear"]}}
        return {
            **groups,
            "ignore": self._left(schemes, linears),
            "quant_algo": algorithm,
            "producer": _producer(),
            "quant_method": METHOD,
        }

    def key_values(
        self, scheme: KeyValueScheme, scales: Mapping[str, tuple[Tensor, Tensor]]
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if scheme != KEY_VALUES:
            raise refusal(
                next(iter(scales)),
                "TensorRT-LLM's KV caches take fp8 with one scale per layer",
                "use quantize-kv-cache with format=fp8 and granularity=layer",
            )
        named = named_scales(scales, KEY_VALUE_PARTS)
        tensors = {name: scale.float().reshape(()) for name, scale in named.items()}
        return {"kv_cache_scheme": _FLOAT8}, tensors

    def own_config(self, schemes: Mapping[str, Scheme], linears: Iterable[str], *, caches: bool) -> dict[str, Any]:
        """hf_quant_config.json.

        Args:
            caches: keys and values are rounded.

        Raises:
            TargetError: linears differ in how they are quantized.
        """
        algorithm = _algorithm(schemes)
        knobs: dict[str, Any] = {}
        if algorithm in (AWQ, NVFP4):
            knobs["group_size"] = next(iter(schemes.values())).group_size
        if algorithm == AWQ:
            knobs |= {"has_zero_point": False, "pre_quant_scale": True}
        inner = {
            "quant_algo": algorithm,
            "kv_cache_quant_algo": CACHE_FP8 if caches else None,
            **knobs,
            "exclude_modules": self._left(schemes, linears),
        }
        return {"producer": _producer(), "quantization": inner}

    def _left(self, schemes: Mapping[str, Scheme], linears: Iterable[str]) -> list[str]:
        return sorted({*linears, *self.embeddings} - set(schemes))


def algorithm_of(scheme: Scheme) -> str | None:
    """The layout's name for a scheme, or None."""
    if not scheme.symmetric:
        return None
    match scheme.format, scheme.bits, scheme.activations:
        case "int", 4, "":
            return AWQ
        case "int", 8, "" if not scheme.group_size:
            return INT8
        case "fp8", 8, "fp8" if scheme.static and scheme.per_tensor:
            return FP8
        case "nvfp4", 4, "nvfp4" if scheme.static:
            return NVFP4
    return None


def _algorithm(schemes: Mapping[str, Scheme]) -> str | None:
    kinds = {(algorithm_of(scheme), scheme.group_size) for scheme in schemes.values()}
    if len(kinds) > 1:
        names = ", ".join(f"{name} g{size}" for name, size in sorted(kinds, key=str))
        raise TargetError(
            f"the layout '{METHOD}' is written with one algorithm for all linears",
            why=f"there are {names}",
            remedy="quantize all linears in the same way, or use --target vllm",
        )
    return next(iter(kinds))[0] if kinds else None


def _described(scheme: Scheme) -> str:
    zero = "" if scheme.symmetric else " with zero points"
    scales = "calibrated" if scheme.static else "per-token"
    inputs = f", {scheme.activations} inputs by {scales} scales" if scheme.activations else ""
    group = f" in groups of {scheme.group_size}" if scheme.group_size else ""
    return f"{scheme.bits}-bit {scheme.format} weights{group}{zero}{inputs}"


def _producer() -> dict[str, str]:
    return {"name": "optc", "version": version()}


def refusal(where: str, why: str, remedy: str = "quantize all linears of one input in the same way") -> TargetError:
    return TargetError("TensorRT-LLM cannot load the quantized linears", where=where, why=why, remedy=remedy)
