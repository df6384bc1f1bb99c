"""Quantized weights of fused linears and of lookups, packed as the CUDA kernels read them.

fused_linear(x, dequantize(codes, scale, zero), ...)      ->  fused_linear(x, packed, scale, zero, ..., format="int4")
fused_linear(x, dequantize_float(codes, scale), ...)      ->  the same, format="fp8"
embedding(dequantize(codes, scale, zero), ids)            ->  packed_embedding(packed, scale, zero, ids, format="int8")
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from optc.compiler.analysis.dataflow import value_of
from optc.compiler.analysis.head_layout import call_of
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import add_weight, replace_call
from optc.compiler.kernels.kernel import find_kernel
from optc.compiler.ops.packed.cuda import PackedWeight, pack_float, pack_integer
from optc.compiler.rewriting.passes import Match, Miss, Rule
from optc.compiler.rewriting.weights import record_weight

aten, optc = torch.ops.aten, torch.ops.optc
_FUSED, _LOOKUP = optc.fused_linear.default, optc.packed_embedding.default
_INTEGERS, _FLOATS = optc.dequantize.default, optc.dequantize_float.default
_FORMATS = {4: "int4", 8: "int8"}


class PackedWeights:
    """The weights that were packed so far, by the call that dequantizes them: a table that is the head's weight too is
    packed once."""

    def __init__(self) -> None:
        self._made: dict[Node, PackedWeight] = {}
        self._placed: dict[Node, tuple[Node | None, ...]] = {}

    def format(self, program: Program, weight: Node) -> str | Miss:
        """The format that a weight is packed in, or why it is not."""
        bits = int(weight.kwargs.get("bits", 8))
        format = "fp8" if weight.target is _FLOATS else _FORMATS.get(bits)
        if format is None:
            return Miss(weight.name, f"weights of {bits} bits have no packed product (4 and 8 have)")
        if any(program.weight_of(item) is None for item in weight.all_input_nodes):
            return Miss(weight.name, "its codes or scales are computed")
        return format

    def packed(self, program: Program, weight: Node) -> PackedWeight:
        """The tensors, before or after they have a place in the program."""
        if weight in self._placed:
            packed, scale, zero = self._placed[weight]
            assert packed is not None
            assert scale is not None
            return PackedWeight(value_of(packed), value_of(scale), None if zero is None else value_of(zero))
        if weight not in self._made:
            codes, scale, *rest = (_tensor(program, item) for item in weight.args)
            if weight.target is _FLOATS:
                self._made[weight] = pack_float(codes, scale)
            else:
                self._made[weight] = pack_integer(codes, scale, rest[0] if rest else None, int(weight.kwargs["bits"]))
        return self._made[weight]

    def place(self, program: Program, weight: Node) -> tuple[Node | None, ...]:
        """The tensors as weights of the program; None where there is no zero point."""
        if weight not in self._placed:
            self._placed[weight] = _place(program, weight, self._made.pop(weight))
        return self._placed[weight]


class PackedLinear(Rule):
    """fused_linear(x, dequantize...(codes, scale, ...)) -> fused_linear over packed codes"""

    def __init__(self, weights: PackedWeights) -> None:
        self._weights = weights

    def match(self, program: Program, node: Node) -> Match | Miss | None:
        if node.target is not _FUSED:
            return None
        weight = call_of(node.args[1], _INTEGERS) or call_of(node.args[1], _FLOATS)
        if weight is None:
            return None
        format = self._weights.format(program, weight)
        if isinstance(format, Miss):
            return Miss(node.name, format.reason)
        knobs = {**node.kwargs, "format": format, "group_size": int(weight.kwargs.get("group_size", 0))}
        args = (node.args[0], *self._weights.packed(program, weight), *node.args[4:])
        reason = _refusal(_FUSED, args, knobs)
        return Match(node, {"weight": weight, "knobs": knobs}) if reason is None else Miss(node.name, reason)

    def rewrite(self, program: Program, match: Match) -> None:
        node, placed = match.node, self._weights.place(program, match.found["weight"])
        replace_call(program, node, _FUSED, (node.args[0], *placed, *node.args[4:]), match.found["knobs"])


class PackedLookup(Rule):
    """embedding(dequantize(codes, scale, zero), ids) -> packed_embedding"""

    def __init__(self, weights: PackedWeights) -> None:
        self._weights = weights

    def match(self, program: Program, node: Node) -> Match | Miss | None:
        source = call_of(node, aten.embedding.default)
        weight = call_of(source.args[0], _INTEGERS) if source is not None else None
        if weight is None:
            return None
        format = self._weights.format(program, weight)
        if isinstance(format, Miss):
            return Miss(node.name, format.reason)
        knobs = {"format": format, "group_size": int(weight.kwargs["group_size"])}
        reason = _refusal(_LOOKUP, (*self._weights.packed(program, weight), node.args[1]), knobs)
        return Match(node, {"weight": weight, "knobs": knobs}) if reason is None else Miss(node.name, reason)

    def rewrite(self, program: Program, match: Match) -> None:
        node, placed = match.node, self._weights.place(program, match.found["weight"])
        replace_call(program, node, _LOOKUP, (*placed, node.args[1]), match.found["knobs"])


def _tensor(program: Program, item: Any) -> Any:
    name = program.weight_of(item) if isinstance(item, Node) else None
    return None if name is None else program.weight(name).detach()


def _refusal(op: Any, args: tuple[Any, ...], knobs: dict[str, Any]) -> str | None:
    """Why the kernel would not take a packed call, or None."""
    kernel = find_kernel(op, "cuda")
    return "there is no kernel for packed weights" if kernel is None else kernel.obstacle_of(args, knobs)


def _place(program: Program, weight: Node, packed: PackedWeight) -> tuple[Node | None, ...]:
    """Add the packed weight and what belongs to it; names beside those of the codes, not below them."""
    codes = program.weight_of(weight.args[0])
    assert codes is not None
    base, contract = codes.removesuffix("_codes"), program.contract
    sources, entry = contract.sources.get(codes, (codes,)), contract.quantization.get(codes)
    placed: list[Node | None] = []
    for suffix, tensor in zip(("packed", "scales", "zero_points"), packed, strict=True):
        if tensor is None:
            placed.append(None)
            continue
        record_weight(program, f"{base}_{suffix}", sources, entry if suffix == "packed" else None)
        placed.append(add_weight(program, f"{base}_{suffix}", tensor))
    return tuple(placed)
