"""Convolutions and linears over 8-bit codes, as ONNX Runtime fuses them into integer kernels.

linear(dequantize_tensor(...), dequantize(8 bits), bias)      ->  dequantize_tensor(...) @ dequantize_channels(...) + bias
conv(dequantize_tensor(...), view(dequantize(8 bits)), bias)  ->  conv(dequantize_tensor(...), dequantize_channels(...), bias)
"""

from __future__ import annotations

import torch
from torch.fx import Node

from optc.compiler.analysis.convolutions import CONVOLUTIONS, unpadded
from optc.compiler.analysis.dataflow import value_of
from optc.compiler.analysis.head_layout import call_of
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import add_weight, insert_call, replace_call, replace_node
from optc.compiler.ops.packed.onnxruntime_products import MIDDLE
from optc.compiler.rewriting.passes import Match, Miss, Rule
from optc.compiler.rewriting.weights import record_weight

aten, optc = torch.ops.aten, torch.ops.optc


class StaticProduct(Rule):
    """A product of an activation in codes and a weight of 8 bits with a scale per channel."""

    def __init__(self) -> None:
        self._made: dict[str, Node] = {}

    def match(self, program: Program, node: Node) -> Match | Miss | None:
        if node.target not in (aten.linear.default, *CONVOLUTIONS):
            return None
        if call_of(unpadded(node.args[0]), optc.dequantize_tensor.default) is None:
            return None
        weight = node.args[1]
        made = call_of(weight, optc.dequantize.default) or call_of(
            getattr(weight, "args", (None,))[0], optc.dequantize.default
        )
        if made is None or made.kwargs["bits"] != 8 or made.args[2] is not None or made.kwargs["group_size"] != 0:
            return Miss(node.name, "its weight is not of 8-bit symmetric integers with a scale per channel")
        if None in [program.weight_of(item) for item in made.args[:2]]:
            return Miss(node.name, "codes or scales are computed, not weights")
        return Match(node, {"dequantize": made})

    def rewrite(self, program: Program, match: Match) -> None:
        node, made = match.node, match.found["dequantize"]
        weight = self._weight(program, made, node)
        if node.target is not aten.linear.default:
            node.update_arg(1, weight)
            return
        product = insert_call(program, node, aten.matmul.default, (node.args[0], weight))
        bias = (*node.args, None)[2]
        if bias is None:
            replace_node(program, node, product)
        else:
            replace_call(program, node, aten.add.Tensor, (product, bias))

    def _weight(self, program: Program, made: Node, node: Node) -> Node:
        """The weight of signed codes, in the shape of the product, made once where the canonical one was."""
        codes, scale = (program.weight_of(item) for item in made.args[:2])
        assert codes is not None
        assert scale is not None
        if codes in self._made:
            return self._made[codes]
        linear = node.target is aten.linear.default
        signed = (program.weight(codes).to(torch.int16) - MIDDLE).to(torch.int8)
        signed = signed.t() if linear else signed.reshape([int(size) for size in value_of(node.args[1]).shape])
        base, contract = codes.removesuffix("_codes"), program.contract
        record_weight(program, f"{base}_packed", contract.sources.get(codes, ()), contract.quantization.get(codes))
        parts = (
            add_weight(program, f"{base}_packed", signed.contiguous()),
            add_weight(program, f"{base}_scales", program.weight(scale).reshape(-1).contiguous()),
        )
        knobs = {"axis": 1 if linear else 0}
        self._made[codes] = insert_call(program, made, optc.dequantize_channels.default, parts, knobs)
        return self._made[codes]
