"""Weights of integers in blocks onto kernels of ONNX Runtime's CPU provider.

linear(x, dequantize(codes, scale, zero))      ->  matmul_nbits(x, packed, scales, zeros)
embedding(dequantize(codes, scale, zero), ids) ->  gather_nbits(ids, packed, scales, zeros)

Both take the same tensors: a table that is the head's weight too is packed once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from optc.compiler.analysis.dataflow import value_of
from optc.compiler.analysis.head_layout import call_of
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import add_weight, replace_call
from optc.compiler.ops.packed.onnxruntime import pack_nbits
from optc.compiler.rewriting.passes import Match, Miss, Rule
from optc.compiler.rewriting.weights import record_weight
from optc.passes.legalization.ort_linears import GROUPS

aten, optc = torch.ops.aten, torch.ops.optc


def stored_layout(columns: int, bits: int, group_size: int) -> tuple[int, int]:
    """Bits of a stored code and columns of a stored scale (0: the kernels have none such) of rows of `columns`.

    A row that is one group is cut into blocks of one scale. 3-bit codes lie in 4-bit fields: the kernels have none.
    """
    size = group_size or columns
    if size == columns and size not in GROUPS:
        size = next((item for item in reversed(GROUPS) if columns % item == 0), 0)
    return 4 if bits == 3 else bits, size if size in GROUPS else 0


class PackedWeights:
    """The weights that were packed so far, by the name of their codes."""

    def __init__(self) -> None:
        self._made: dict[str, tuple[Node | None, ...]] = {}

    def layout(self, program: Program, weight: Node, kernel: str) -> dict[str, int] | str:
        """K, N, bits and block_size of a dequantization as a kernel takes them, or why it does not."""
        if None in [program.weight_of(argument) for argument in weight.args[:2]]:
            return "codes or scales are computed, not weights"
        rows, columns = (int(size) for size in value_of(weight).shape)
        size = int(weight.kwargs["group_size"])
        bits, block = stored_layout(columns, int(weight.kwargs["bits"]), size)
        if not block:
            return f"{kernel} takes groups of {', '.join(map(str, GROUPS))}, not of {size or columns}"
        return {"K": columns, "N": rows, "bits": bits, "block_size": block}

    def parts(self, program: Program, weight: Node, layout: dict[str, int]) -> tuple[Node | None, ...]:
        """The packed codes, scales and zero points (None without) of a dequantization, as weights."""
        codes = program.weight_of(weight.args[0])
        assert codes is not None
        if codes not in self._made:
            self._made[codes] = self._pack(program, weight, codes, layout)
        return self._made[codes]

    def _pack(self, program: Program, weight: Node, codes: str, layout: dict[str, int]) -> tuple[Node | None, ...]:
        """Add the parts; names beside those of the codes, not below them."""
        scale, zero = (program.weight_of(item) for item in weight.args[1:3])
        assert scale is not None
        bits, width = int(weight.kwargs["bits"]), layout["bits"]
        rows, blocks = layout["N"], layout["K"] // layout["block_size"]

        def per_block(tensor: Tensor) -> Tensor:
            """[N,G] as [N,blocks]: a scale for the whole row is repeated."""
            return tensor.reshape(rows, -1).repeat_interleave(blocks // (tensor.numel() // rows), 1).contiguous()

        base, contract = codes.removesuffix("_codes"), program.contract
        values = program.weight(codes)
        if zero is None and bits != width:
            values = values + (2 ** (width - 1) - 2 ** (bits - 1))  # the middle codes coincide
        packed = pack_nbits(values.reshape(rows, blocks, -1), width)
        points = None if zero is None else pack_nbits(per_block(program.weight(zero)), width)
        record_weight(program, f"{base}_packed", contract.sources.get(codes, ()), contract.quantization.get(codes))
        return (
            add_weight(program, f"{base}_packed", packed),
            add_weight(program, f"{base}_scales", per_block(program.weight(scale))),
            None if points is None else add_weight(program, f"{base}_zero_points", points),
        )


class MatMulNBits(Rule):
    """linear(x, dequantize(codes, scale, zero), bias) -> matmul_nbits"""

    def __init__(self, packed: PackedWeights) -> None:
        self._packed = packed

    def match(self, program: Program, node: Node) -> Match | Miss | None:
        source = call_of(node, aten.linear.default)
        weight = call_of(source.args[1], optc.dequantize.default) if source is not None else None
        if weight is None:
            return None
        layout = self._packed.layout(program, weight, "MatMulNBits")
        return Miss(node.name, layout) if isinstance(layout, str) else Match(node, {"weight": weight, "layout": layout})

    def rewrite(self, program: Program, match: Match) -> None:
        node, layout = match.node, match.found["layout"]
        args = (node.args[0], *self._packed.parts(program, match.found["weight"], layout), (*node.args, None)[2])
        replace_call(program, node, optc.matmul_nbits.default, args, {**layout, "accuracy_level": 0})


class GatherNBits(Rule):
    """embedding(dequantize(codes, scale, zero), ids) -> gather_nbits"""

    def __init__(self, packed: PackedWeights) -> None:
        self._packed = packed

    def match(self, program: Program, node: Node) -> Match | Miss | None:
        source = call_of(node, aten.embedding.default)
        weight = call_of(source.args[0], optc.dequantize.default) if source is not None else None
        if weight is None:
            return None
        layout = self._packed.layout(program, weight, "GatherBlockQuantized")
        if isinstance(layout, str):
            return Miss(node.name, layout)
        if layout["bits"] not in (4, 8):
            return Miss(node.name, f"GatherBlockQuantized takes 4 and 8 bits, not {layout['bits']}")
        return Match(node, {"weight": weight, "layout": layout})

    def rewrite(self, program: Program, match: Match) -> None:
        node = match.node
        layout: dict[str, Any] = dict(match.found["layout"])
        parts = self._packed.parts(program, match.found["weight"], layout)
        del layout["N"]
        replace_call(program, node, optc.gather_nbits.default, (node.args[1], *parts), layout)
