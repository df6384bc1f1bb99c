"""Quantized weights of fused linears, packed as the CUDA kernels read them.

fused_linear(x, dequantize(codes, scale, zero), ...)      ->  fused_linear(x, packed, scale, zero, ..., format="int4")
fused_linear(x, dequantize_float(codes, scale), ...)      ->  the same, format="fp8"
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

optc = torch.ops.optc
_FUSED, _INTEGERS, _FLOATS = optc.fused_linear.default, optc.dequantize.default, optc.dequantize_float.default
_FORMATS = {4: "int4", 8: "int8"}


class PackedLinear(Rule):
    """fused_linear(x, dequantize...(codes, scale, ...)) -> fused_linear over packed codes"""

    def __init__(self) -> None:
        self._made: dict[Node, PackedWeight] = {}
        self._placed: dict[Node, tuple[Node | None, ...]] = {}

    def match(self, program: Program, node: Node) -> Match | Miss | None:
        if node.target is not _FUSED:
            return None
        weight = call_of(node.args[1], _INTEGERS) or call_of(node.args[1], _FLOATS)
        if weight is None:
            return None
        bits = 8 if weight.target is _FLOATS else int(weight.kwargs["bits"])
        format = "fp8" if weight.target is _FLOATS else _FORMATS.get(bits)
        if format is None:
            return Miss(node.name, f"weights of {bits} bits have no packed product (4 and 8 have)")
        if any(program.weight_of(item) is None for item in weight.all_input_nodes):
            return Miss(node.name, "its codes or scales are computed")
        packed = self._packed(program, weight, bits)
        knobs = {**node.kwargs, "format": format, "group_size": int(weight.kwargs["group_size"])}
        reason = _refusal(node, packed, knobs)
        return Match(node, {"weight": weight, "knobs": knobs}) if reason is None else Miss(node.name, reason)

    def rewrite(self, program: Program, match: Match) -> None:
        node, weight = match.node, match.found["weight"]
        if weight not in self._placed:
            self._placed[weight] = _place(program, weight, self._made.pop(weight))
        replace_call(program, node, _FUSED, (node.args[0], *self._placed[weight], *node.args[4:]), match.found["knobs"])

    def _packed(self, program: Program, weight: Node, bits: int) -> PackedWeight:
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
                self._made[weight] = pack_integer(codes, scale, rest[0] if rest else None, bits)
        return self._made[weight]


def _tensor(program: Program, item: Any) -> Any:
    name = program.weight_of(item) if isinstance(item, Node) else None
    return None if name is None else program.weight(name).detach()


def _refusal(node: Node, packed: PackedWeight, knobs: dict[str, Any]) -> str | None:
    """Why the kernel would not take the packed call, or None."""
    kernel = find_kernel(_FUSED, "cuda")
    if kernel is None:
        return "there is no kernel for packed weights"
    args = [value_of(item) if isinstance(item, Node) else item for item in node.args]
    return kernel.accepts((args[0], *packed, *args[4:]), knobs)


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
