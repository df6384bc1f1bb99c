"""Reads linears of ModelOpt folders; the layout is described in `optc.compiler.formats.layouts.modelopt`."""

from __future__ import annotations

import torch
from torch import Tensor

from optc.compiler.formats.layouts.config import ConfigReader
from optc.compiler.formats.layouts.key_values import FolderKeyValues, find_key_values
from optc.compiler.formats.layouts.modelopt import (
    ALGORITHMS,
    AWQ,
    CACHE_FP8,
    FP8,
    INT8,
    KEY_VALUE_PARTS,
    KEY_VALUES,
    NVFP4,
)
from optc.compiler.formats.layouts.tensors import FLOATS, TensorReader
from optc.compiler.formats.layouts.weight import QuantizedWeight, Scheme, check_parts
from optc.compiler.ops.dialect.nvfp4 import BLOCK

_PARTS = ("weight", "weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale")


class ModelOpt:
    """Reads the linears of one folder.

    Args:
        config: the object `quantization` of hf_quant_config.json, or `quantization_config` of config.json.

    Raises (all methods):
        InputError: an algorithm that optc has no form for, or tensors that do not fit it.
    """

    def __init__(self, config: ConfigReader, reader: TensorReader) -> None:
        self._config, self._reader = config, reader
        self._algorithm = config.text("quant_algo")
        config.choice("quant_algo", self._algorithm, (*ALGORITHMS, ""))
        config.choice("kv_cache_quant_algo", config.text("kv_cache_quant_algo"), (CACHE_FP8, ""))
        config.choice("has_zero_point", config.boolean("has_zero_point", False), (False,))
        if not config.absent("kv_cache_scheme"):
            scheme = config.part("kv_cache_scheme")
            scheme.choice("num_bits", scheme.integer("num_bits"), (8,))
            scheme.choice("type", scheme.text("type"), ("float",))

    def modules(self) -> list[str]:
        """The linears that the files hold quantized."""
        names = [name for name in self._reader.tensors if name.endswith(".weight_scale")]
        if names and not self._algorithm:
            raise self._config.refusal(f"'quant_algo' is missing, and '{names[0]}' is there")
        return [name.removesuffix(".weight_scale") for name in names]

    def parts(self, module: str) -> tuple[str, ...]:
        """The tensors of one linear's weight."""
        return tuple(f"{module}.{name}" for name in _PARTS if f"{module}.{name}" in self._reader)

    def shape(self, module: str) -> tuple[int, int]:
        """[N, K] of one linear, from the headers."""
        shape = self._reader.shape(f"{module}.weight")
        if len(shape) != 2:
            raise self._reader.wrong_shape(f"{module}.weight", f"found {list(shape)}, expected two axes")
        return shape[0] * (1 + (self._algorithm == AWQ)), shape[1] * (1 + (self._algorithm == NVFP4))

    def read(self, module: str) -> QuantizedWeight:
        """One linear's weight."""
        read = {AWQ: self._awq, INT8: self._int8, FP8: self._fp8, NVFP4: self._nvfp4}[self._algorithm]
        return check_parts(read(module), module)

    def key_values(self) -> FolderKeyValues | None:
        """The scales of keys and values, where the files hold any."""
        return find_key_values(self._reader, KEY_VALUES, KEY_VALUE_PARTS)

    def _awq(self, module: str) -> QuantizedWeight:
        packed = self._reader.matrix(f"{module}.weight", torch.uint8)
        scale = self._reader.matrix(f"{module}.weight_scale", *FLOATS)
        codes = torch.stack([packed & 15, packed >> 4], 1).flatten(0, 1) ^ 8  # signed to code = value + 8
        columns, groups = codes.shape[1], scale.shape[1]
        if not groups or columns % groups:
            raise self._reader.wrong_shape(f"{module}.weight_scale", f"{groups} groups do not divide {columns} columns")
        scheme = Scheme(bits=4, group_size=columns // groups, symmetric=True)
        return QuantizedWeight(scheme, codes, scale, input_factor=self._factor(module, columns))

    def _factor(self, module: str, columns: int) -> Tensor | None:
        """What the input is multiplied by, None where that is one everywhere."""
        name = f"{module}.pre_quant_scale"
        if name not in self._reader:
            return None
        factor = self._reader.read(name, *FLOATS)
        if tuple(factor.shape) != (columns,):
            raise self._reader.wrong_shape(name, f"found {list(factor.shape)}, expected {[columns]}")
        return None if bool((factor == 1).all()) else factor

    def _int8(self, module: str) -> QuantizedWeight:
        codes = self._reader.matrix(f"{module}.weight", torch.int8).to(torch.int16) + 128
        scale = self._reader.read(f"{module}.weight_scale", *FLOATS)
        scheme = Scheme(bits=8, group_size=0, symmetric=True)
        return QuantizedWeight(scheme, codes.to(torch.uint8), scale.reshape(-1, 1))

    def _fp8(self, module: str) -> QuantizedWeight:
        codes = self._reader.matrix(f"{module}.weight", torch.float8_e4m3fn)
        scale = self._one(f"{module}.weight_scale").reshape(1, 1)
        scheme = Scheme(
            bits=8, group_size=0, symmetric=True, format="fp8", activations="fp8", per_tensor=True, static=True
        )
        return QuantizedWeight(scheme, codes, scale, input_scale=self._one(f"{module}.input_scale"))

    def _nvfp4(self, module: str) -> QuantizedWeight:
        packed = self._reader.matrix(f"{module}.weight", torch.uint8)
        codes = torch.stack([packed & 15, packed >> 4], 2).flatten(1)
        scale = self._reader.matrix(f"{module}.weight_scale", torch.float8_e4m3fn)
        scheme = Scheme(bits=4, group_size=BLOCK, symmetric=True, format="nvfp4", activations="nvfp4", static=True)
        return QuantizedWeight(
            scheme,
            codes,
            scale,
            global_scale=self._one(f"{module}.weight_scale_2"),
            input_scale=self._one(f"{module}.input_scale"),
        )

    def _one(self, name: str) -> Tensor:
        """A tensor of one positive number, as float32 [1]."""
        value = self._reader.positive(name)
        if value.numel() != 1:
            raise self._reader.wrong_shape(name, f"found {list(value.shape)}, expected one number")
        return value.reshape(1)
