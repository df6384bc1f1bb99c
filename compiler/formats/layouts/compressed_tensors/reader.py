"""Reads linears of compressed-tensors folders; the layout is described in `optc.compiler.formats.layouts.compressed_tensors`."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from optc.compiler.formats.layouts.blocks import BLOCK_SCHEME, BLOCKS, spread_rows
from optc.compiler.formats.layouts.column_order import column_order
from optc.compiler.formats.layouts.compressed_tensors import (
    DENSE,
    FLOAT,
    FLOAT4,
    INT,
    KEY_VALUE_PARTS,
    MX_FLOAT4,
    PACKED,
    STRATEGIES,
)
from optc.compiler.formats.layouts.compressed_tensors.targets import names
from optc.compiler.formats.layouts.compressed_tensors.transforms import check_named, rotation_of, turns
from optc.compiler.formats.layouts.config import ConfigReader
from optc.compiler.formats.layouts.key_values import FolderKeyValues, KeyValueScheme, find_key_values
from optc.compiler.formats.layouts.tensors import FLOATS, TensorReader
from optc.compiler.formats.layouts.weight import QuantizedWeight, Scheme, check_parts
from optc.compiler.formats.layouts.words import unpack_words, word_count
from optc.compiler.ir.contract import ActivationFormat
from optc.compiler.ops.dialect.mxfp4 import BLOCK as MX_BLOCK
from optc.compiler.ops.dialect.nvfp4 import BLOCK
from optc.compiler.ops.dialect.quantization import FP8_BLOCK

_FORMATS = (PACKED, INT, FLOAT, FLOAT4, MX_FLOAT4, "naive-quantized")
_SUFFIXES = ("weight_packed", "weight_scale")
_OTHER_PARTS = ("input_scale", "input_zero_point")
_FLOAT4_PARTS = ("weight_global_scale", "input_global_scale")


@dataclass(frozen=True)
class _Group:
    name: str
    targets: tuple[str, ...]
    scheme: Scheme
    packed: bool

    @property
    def float4(self) -> bool:
        return self.scheme.format in ("nvfp4", "mxfp4")


class CompressedTensors:
    """Reads the linears of one folder.

    Raises (all methods):
        InputError: a scheme that optc has no form for, or tensors that do not fit it.
    """

    def __init__(self, config: ConfigReader, reader: TensorReader) -> None:
        self._config, self._reader = config, reader
        top = config.text("format", PACKED)
        config.choice("format", top, (*_FORMATS, DENSE, "mixed-precision"))
        self._key_values = None if config.absent("kv_cache_scheme") else _key_values(config.part("kv_cache_scheme"))
        if any(not inner.absent("format") for inner in _optional(config, "sparsity_config")):
            raise config.refusal("'sparsity_config' is set, and optc does not read sparse weights")
        self._turns = [] if config.absent("transform_config") else turns(config.part("transform_config"))
        self._groups = [_group(name, part, top) for name, part in config.parts("config_groups").items()]

    def modules(self) -> list[str]:
        """The linears that the files hold quantized."""
        found: dict[str, None] = {}
        for name in self._reader.tensors:
            module, _, last = name.rpartition(".")
            if last in _SUFFIXES:
                found[module] = None
            elif last in _FLOAT4_PARTS and any(group.scheme.format == "nvfp4" for group in self._groups):
                continue
            elif last in (*_OTHER_PARTS, *_FLOAT4_PARTS) or (last in KEY_VALUE_PARTS and self._key_values is None):
                raise self._config.refusal(f"optc cannot represent the tensor '{name}'")
        check_named(self._turns, self._reader, list(found))
        return list(found)

    def parts(self, module: str) -> tuple[str, ...]:
        """The tensors of one linear's weight."""
        known = (
            "weight",
            "weight_packed",
            "weight_scale",
            "weight_shape",
            "weight_zero_point",
            "weight_g_idx",
            *_FLOAT4_PARTS,
            *dict.fromkeys(turn.part for turn in self._turns),
        )
        return tuple(f"{module}.{part}" for part in known if f"{module}.{part}" in self._reader)

    def shape(self, module: str) -> tuple[int, int]:
        """[N, K] of one linear, from the headers where they tell it."""
        if self._group(module).float4:
            rows, halves = self._two(f"{module}.weight_packed")
            return rows, 2 * halves
        if not self._group(module).packed:
            rows, columns = self._two(f"{module}.weight")
            return rows, columns
        name = f"{module}.weight_shape"
        stored = self._reader.read(name, torch.int64, torch.int32).reshape(-1).tolist()
        rows, words = self._two(f"{module}.weight_packed")
        bits = self._group(module).scheme.bits
        if len(stored) != 2 or stored[0] != rows or stored[1] <= 0 or word_count(int(stored[1]), bits) != words:
            raise self._reader.wrong_shape(
                name, f"it says {stored}, and weight_packed is {[rows, words]} of {bits} bits"
            )
        return int(stored[0]), int(stored[1])

    def read(self, module: str) -> QuantizedWeight:
        """One linear's weight."""
        weight = self._stored(module)
        size = rotation_of(self._turns, module, self._reader, weight.shape[1])
        return replace(weight, scheme=replace(weight.scheme, rotation=size)) if size else weight

    def _stored(self, module: str) -> QuantizedWeight:
        group = self._group(module)
        if group.float4:
            return check_parts(self._float4(module, group.scheme), module)
        rows, columns = self.shape(module)
        scale = self._reader.read(f"{module}.weight_scale", *FLOATS)
        scale = scale.reshape(1, 1) if group.scheme.per_tensor and scale.numel() == 1 else scale
        scale = scale[:, None] if scale.dim() == 1 else scale
        if group.scheme.format == "fp8" and group.scheme.group_size:
            scale = spread_rows(self._reader, f"{module}.weight_scale", scale, rows)
        zero = order = None
        if group.packed:
            words = self._reader.matrix(f"{module}.weight_packed", torch.int32)
            codes = unpack_words(words, group.scheme.bits, columns)
            zero = None if group.scheme.symmetric else self._zero(module, group.scheme.bits, rows)
            order = self._order(module, group.scheme, columns)
            codes = codes if order is None else codes[:, order].contiguous()
        elif group.scheme.format == "fp8":
            codes = self._reader.matrix(f"{module}.weight", torch.float8_e4m3fn)
        else:
            codes = (self._reader.matrix(f"{module}.weight", torch.int8).to(torch.int16) + 128).to(torch.uint8)
        return check_parts(QuantizedWeight(group.scheme, codes, scale, zero, input_order=order), module)

    def key_values(self) -> FolderKeyValues | None:
        """The scales of keys and values, None where the config has no scheme for them."""
        if self._key_values is None:
            return None
        found = find_key_values(self._reader, self._key_values, KEY_VALUE_PARTS)
        if found is None:
            raise self._config.refusal("'kv_cache_scheme' is set, but there is no k_scale or v_scale tensor")
        return found

    def _float4(self, module: str, scheme: Scheme) -> QuantizedWeight:
        packed = self._reader.matrix(f"{module}.weight_packed", torch.uint8)
        codes = torch.stack([packed & 15, packed >> 4], 2).flatten(1)
        if scheme.format == "mxfp4":
            return QuantizedWeight(scheme, codes, self._reader.matrix(f"{module}.weight_scale", torch.uint8))
        scale = self._reader.matrix(f"{module}.weight_scale", torch.float8_e4m3fn)
        over, inputs = (f"{module}.{name}" for name in _FLOAT4_PARTS)
        return QuantizedWeight(
            scheme,
            codes,
            scale,
            global_scale=self._reciprocal(over),
            input_scale=self._reciprocal(inputs) if scheme.static else None,
        )

    def _reciprocal(self, name: str) -> Tensor:
        value = self._reader.read(name, torch.float32).reshape(-1)
        if value.numel() != 1 or not 0 < float(value) < math.inf:
            raise self._reader.wrong_shape(name, "it must be one positive number")
        return 1 / value

    def _zero(self, module: str, bits: int, rows: int) -> Tensor:
        name = f"{module}.weight_zero_point"
        words = self._reader.matrix(name, torch.int32).t().contiguous()
        if words.shape[1] != word_count(rows, bits):
            raise self._reader.wrong_shape(name, f"it has {words.shape[1]} words for {rows} rows of {bits} bits")
        return unpack_words(words, bits, rows).t().contiguous()

    def _order(self, module: str, scheme: Scheme, columns: int) -> Tensor | None:
        """See `column_order`; -1 is the library's mark for "not used"."""
        name = f"{module}.weight_g_idx"
        if name not in self._reader:
            return None
        return column_order(self._config, self._reader, name, columns, scheme.group_size or columns, unused=-1)

    def _two(self, name: str) -> tuple[int, int]:
        shape = self._reader.shape(name)
        if len(shape) != 2:
            raise self._reader.wrong_shape(name, f"found {list(shape)}, expected two axes")
        return shape[0], shape[1]

    def _group(self, module: str) -> _Group:
        """The group whose targets name a linear: by its full name or a pattern first, then by class."""
        if len(self._groups) == 1:
            return self._groups[0]
        for group in self._groups:
            if any(names(target, module, self._config) for target in group.targets):
                return group
        for group in self._groups:
            if "Linear" in group.targets:
                return group
        raise self._config.refusal(f"no group of config_groups names the quantized linear '{module}'")


def _optional(config: ConfigReader, key: str) -> list[ConfigReader]:
    return [] if config.absent(key) else [config.part(key)]


def _group(name: str, part: ConfigReader, top: str) -> _Group:
    layout = part.text("format", top)
    part.choice("format", layout, _FORMATS)
    if not part.absent("output_activations"):
        raise part.refusal("'output_activations' is set, and optc does not round outputs")
    weights = part.part("weights")
    if layout == MX_FLOAT4:
        return _Group(name, tuple(part.texts("targets")), _mx_float4(part, weights), packed=False)
    if layout == FLOAT4:
        return _Group(name, tuple(part.texts("targets")), _float4(part, weights), packed=False)
    kind = weights.text("type", "int")
    weights.choice("type", kind, ("int", "float"))
    strategy = weights.text("strategy", "group" if not weights.absent("group_size") else "channel")
    weights.choice("strategy", strategy, ("group", "channel") if kind == "int" else ("channel", "tensor", "block"))
    bits = weights.integer("num_bits", 8)
    weights.choice("num_bits", bits, (2, 3, 4, 8) if layout == PACKED else (8,))
    symmetric = weights.boolean("symmetric", True)
    if layout != PACKED and not symmetric:
        raise weights.refusal("zero points are read in the pack-quantized format only")
    if (layout == PACKED and kind != "int") or (layout == FLOAT and kind != "float"):
        raise weights.refusal(f"weights of type {kind} are not compatible with the format {layout}")
    if strategy == "block":
        return _Group(name, tuple(part.texts("targets")), _blocks(part, weights), packed=False)
    scheme = Scheme(
        bits=bits,
        group_size=weights.integer("group_size") if strategy == "group" else 0,
        symmetric=symmetric,
        format="int" if kind == "int" else "fp8",
        activations=_activations(part),
        per_tensor=strategy == "tensor",
    )
    return _Group(name, tuple(part.texts("targets")), scheme, layout == PACKED)


def _blocks(part: ConfigReader, weights: ConfigReader) -> Scheme:
    """Of fp8 weights in blocks, and of inputs in groups that are as long."""
    weights.choice("block_structure", weights.integers("block_structure"), (BLOCKS,))
    inputs = part.part("input_activations")
    inputs.choice("type", inputs.text("type"), ("float",))
    inputs.choice("num_bits", inputs.integer("num_bits"), (8,))
    inputs.choice("strategy", inputs.text("strategy"), ("group",))
    inputs.choice("group_size", inputs.integer("group_size"), (FP8_BLOCK,))
    if not inputs.boolean("dynamic", False) or not inputs.boolean("symmetric", True):
        raise inputs.refusal("optc rounds inputs to fp8 in groups symmetrically, by scales taken at run time")
    return BLOCK_SCHEME


def _float4(part: ConfigReader, weights: ConfigReader) -> Scheme:
    """Of weights in nvfp4, and of inputs where they are rounded: block scales at run time, below a calibrated one."""
    rounds = not part.absent("input_activations")
    for each in (weights, part.part("input_activations")) if rounds else (weights,):
        _check_float4(each, "tensor_group", BLOCK)
    if rounds:
        inputs = part.part("input_activations")
        inputs.choice("dynamic", inputs.text("dynamic"), ("local",))
    return Scheme(
        bits=4,
        group_size=BLOCK,
        symmetric=True,
        format="nvfp4",
        activations="nvfp4" if rounds else "",
        static=rounds,
    )


def _mx_float4(part: ConfigReader, weights: ConfigReader) -> Scheme:
    """Of weights in mxfp4."""
    _check_float4(weights, "group", MX_BLOCK)
    if not part.absent("input_activations"):
        raise part.refusal("'input_activations' is set, and optc does not round inputs to mxfp4")
    return Scheme(bits=4, group_size=MX_BLOCK, symmetric=True, format="mxfp4")


def _check_float4(part: ConfigReader, strategy: str, block: int) -> None:
    part.choice("type", part.text("type"), ("float",))
    part.choice("num_bits", part.integer("num_bits"), (4,))
    part.choice("strategy", part.text("strategy"), (strategy,))
    part.choice("group_size", part.integer("group_size"), (block,))
    if not part.boolean("symmetric", True):
        raise part.refusal("there are no zero points in 4-bit floats")


def _key_values(part: ConfigReader) -> KeyValueScheme:
    kind, strategy = part.text("type", "int"), part.text("strategy", "tensor")
    part.choice("type", kind, ("int", "float"))
    part.choice("num_bits", part.integer("num_bits", 8), (8,))
    part.choice("strategy", strategy, tuple(STRATEGIES))
    if not part.boolean("symmetric", True) or part.boolean("dynamic", False):
        raise part.refusal("optc rounds keys and values symmetrically, with fixed scales")
    return KeyValueScheme("int8" if kind == "int" else "fp8", STRATEGIES[strategy])


def _activations(part: ConfigReader) -> ActivationFormat:
    if part.absent("input_activations"):
        return ""
    inputs = part.part("input_activations")
    if inputs.text("strategy") != "token" or not inputs.boolean("dynamic", False):
        raise inputs.refusal(
            "optc reads activation scales that are taken per token at run time (strategy token, dynamic)"
        )
    if inputs.integer("num_bits", 8) != 8 or not inputs.boolean("symmetric", True):
        raise inputs.refusal("optc rounds activations to 8 bits, symmetrically")
    kind = inputs.text("type", "int")
    inputs.choice("type", kind, ("int", "float"))
    return "int8" if kind == "int" else "fp8"
