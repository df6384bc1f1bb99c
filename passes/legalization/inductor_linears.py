"""Quantized linears as packed products of the op library.

linear(x, dequantize(codes, scale, zero), bias)                                     ->  linear_nbits(x, packed, ...)
linear(x, dequantize_codebook(codes, scale, table), bias)                           ->  the same, with the table
linear(dequantize_activation(quantize_dynamic(x, int8)), dequantize(codes), bias)   ->  the same, rounding x inside
embedding(dequantize(codes, scale, zero), ids)                                      ->  rows of the same packed codes
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from optc.compiler.analysis.dataflow import value_of
from optc.compiler.analysis.head_layout import call_of
from optc.compiler.analysis.linears import quantized_activation
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import add_weight, replace_call
from optc.compiler.kernels.cpu.linear_nbits import obstacle
from optc.compiler.ops.packed.inductor_cpu import (
    KEPT,
    PER_TOKEN,
    TILE_ROWS,
    pack_rows,
    pack_tiles,
    packed_rows,
    segment_size,
)
from optc.compiler.rewriting.inlining import inline_call
from optc.compiler.rewriting.passes import Match, Miss, Rule
from optc.compiler.rewriting.weights import record_weight

aten, optc = torch.ops.aten, torch.ops.optc
INTEGERS, CODEBOOK = optc.dequantize.default, optc.dequantize_codebook.default


class PackedCodes:
    """The weights that were packed so far: what several calls read is stored once."""

    def __init__(self) -> None:
        self._made: dict[tuple[Node, int], tuple[Node | None, ...]] = {}

    def place(self, program: Program, weight: Node, segment: int) -> tuple[Node | None, ...]:
        """Codes, scales, zero points and table as weights of the program; None for what there is not."""
        key = (weight, segment)
        if key not in self._made:
            self._made[key] = _pack(program, weight, segment)
        return self._made[key]


class PackedProduct(Rule):
    """linear(x, dequantize...(codes, scale, ...), bias) -> linear_nbits

    Scales are kept in 16 bits where that loses nothing.
    """

    def __init__(self, codes: PackedCodes) -> None:
        self._codes = codes

    def match(self, program: Program, node: Node) -> Match | Miss | None:
        if node.target is not aten.linear.default:
            return None
        weight = call_of(node.args[1], INTEGERS) or call_of(node.args[1], CODEBOOK)
        if weight is None:
            return None
        x, level = node.args[0], KEPT
        assert isinstance(x, Node)
        rounding = quantized_activation(x)
        if rounding is not None and _is_per_token(rounding):
            source = rounding.args[0]
            assert isinstance(source, Node)
            if value_of(source).dtype is value_of(x).dtype:
                x, level = source, PER_TOKEN
        reason = _obstacle(program, value_of(x).dtype, weight, level)
        if reason is not None:
            return Miss(node.name, reason)
        return Match(node, {"weight": weight, "x": x, "level": level})

    def rewrite(self, program: Program, match: Match) -> None:
        node, weight, level = match.node, match.found["weight"], match.found["level"]
        rows, columns = (int(size) for size in value_of(weight).shape)
        group = int(weight.kwargs["group_size"]) % columns
        packed, scale, zero, table = self._codes.place(program, weight, segment_size(columns, group, level))
        bias = (*node.args, None)[2]
        knobs = {
            "bits": int(weight.kwargs["bits"]),
            "group_size": group,
            "activation_group": level,
            "K": columns,
            "N": rows,
        }
        args = (match.found["x"], packed, scale, zero, bias, table)
        replace_call(program, node, optc.linear_nbits.default, args, knobs)


class PackedLookup(Rule):
    """embedding(dequantize(codes, scale, zero), ids) -> the rows of packed codes, as `packed_rows` finds them

    They are packed as a product has them that takes activations as they are, so that a tied head reads the same.
    """

    def __init__(self, codes: PackedCodes) -> None:
        self._codes = codes

    def match(self, program: Program, node: Node) -> Match | Miss | None:
        if node.target is not aten.embedding.default:
            return None
        weight = call_of(node.args[0], INTEGERS)
        if weight is None:
            return None
        if 8 % int(weight.kwargs["bits"]):
            return Miss(node.name, f"rows of {weight.kwargs['bits']}-bit codes are not looked up packed")
        if any(item is not None and _value(program, item) is None for item in weight.args):
            return Miss(node.name, "its table is computed from activations")
        return Match(node, {"weight": weight})

    def rewrite(self, program: Program, match: Match) -> None:
        node, weight = match.node, match.found["weight"]
        columns = int(value_of(weight).shape[1])
        group = int(weight.kwargs["group_size"]) or columns
        packed, scale, zero, _ = self._codes.place(program, weight, group)
        knobs: dict[str, Any] = {"bits": int(weight.kwargs["bits"]), "segment": group, "group_size": group}
        node.args, node.kwargs = (packed, scale, zero, node.args[1]), {}
        inline_call(program, node, partial(packed_rows, columns=columns, dtype=value_of(node).dtype, **knobs))


def _is_per_token(rounding: Node) -> bool:
    return rounding.target is optc.quantize_dynamic.default and rounding.kwargs["format"] == "int8"


def _obstacle(program: Program, dtype: torch.dtype, weight: Node, level: int) -> str | None:
    """Why the packed product cannot take a weight, or None."""
    reason = obstacle(
        dtype,
        bits=int(weight.kwargs["bits"]),
        columns=int(value_of(weight).shape[1]),
        group_size=int(weight.kwargs["group_size"]),
        activation_group=level,
        codebook=weight.target is CODEBOOK,
    )
    if reason is not None:
        return reason
    names = ("codes", "scales", "zero points" if weight.target is INTEGERS else "table")
    for what, item in zip(names, weight.args, strict=True):
        if item is not None and _value(program, item) is None:
            return f"its {what} are computed from activations"
    return None


def _value(program: Program, item: Any) -> Tensor | None:
    """What a call over weights alone gives, None for anything else."""
    if not isinstance(item, Node):
        return None
    name = program.weight_of(item)
    if name is not None:
        return program.weight(name).detach()
    if item.op != "call_function":
        return None
    values = {part: _value(program, part) for part in item.all_input_nodes}
    if any(value is None for value in values.values()):
        return None
    args, kwargs = torch.fx.node.map_arg((item.args, item.kwargs), values.__getitem__)
    found = item.target(*args, **kwargs)
    return found if isinstance(found, Tensor) else None


def narrow(scale: Tensor) -> Tensor:
    """The same numbers in 16 bits where one of the types holds them all, else as they are."""
    for dtype in (torch.float16, torch.bfloat16):
        short = scale.to(dtype)
        if torch.equal(short.to(scale.dtype), scale):
            return short
    return scale


def _pack(program: Program, weight: Node, segment: int) -> tuple[Node | None, ...]:
    """Add the packed weight and what belongs to it; names beside those of the codes, not below them."""
    codes, scale, last = (None if item is None else _value(program, item) for item in weight.args)
    assert codes is not None
    assert scale is not None
    name = program.weight_of(weight.args[0])
    assert name is not None, "codes are a weight"
    base, contract = name.removesuffix("_codes"), program.contract
    sources = contract.sources.get(name, (name,))
    bits = int(weight.kwargs["bits"])
    tensors: dict[str, Tensor | None] = {
        "packed": pack_tiles(codes, bits, segment),
        "scales": narrow(pack_rows(scale)),
        "zero_points": pack_rows(last) if last is not None and weight.target is INTEGERS else None,
        "table": _sixteen(last) if last is not None and weight.target is CODEBOOK else None,
    }
    placeholders: list[Node | None] = []
    for suffix, tensor in tensors.items():
        if tensor is None:
            placeholders.append(None)
            continue
        entry = contract.quantization.get(name) if suffix == "packed" else None
        record_weight(program, f"{base}_{suffix}", sources, entry)
        placeholders.append(add_weight(program, f"{base}_{suffix}", tensor))
    return tuple(placeholders)


def _sixteen(table: Tensor) -> Tensor:
    """A table of up to 16 values as float32 [16]."""
    assert table.numel() <= TILE_ROWS
    return torch.nn.functional.pad(table.float(), (0, 16 - table.numel()))
