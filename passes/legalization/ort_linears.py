"""Quantized linears onto kernels of ONNX Runtime's CPU provider.

linear(dequantize_activation(quantize_dynamic(x)), dequantize(8 bits))  ->  matmul_integer(quantize_tokens(x), ...)
linear(x, dequantize(codes, scale, zero))                               ->  see ort_nbits.py
linear(x, dequantize_codebook(codes, scale, nf4))                       ->  matmul_bnb4(x, packed, absmax)
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor
from torch.fx import Node

from optc.compiler.analysis.dataflow import evaluate, leaves, value_of
from optc.compiler.analysis.head_layout import call_of
from optc.compiler.analysis.linears import Linear, linear_site, quantized_activation
from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import add_weight, insert_call, replace_call, replace_node
from optc.compiler.ops.packed.onnxruntime import pack_nbits
from optc.compiler.ops.packed.onnxruntime_products import MIDDLE, pack_bnb4
from optc.compiler.rewriting.passes import Match, Miss, Rule
from optc.compiler.rewriting.weights import record_weight

aten, optc = torch.ops.aten, torch.ops.optc
GROUPS = (16, 32, 64, 128, 256)
"""Block sizes of MatMulNBits; the CPU kernel of MatMulBnb4 takes them too."""


class DequantizedProduct(Rule):
    """linear(x, dequantize(codes, scale, zero), bias) -> x @ dequantize_linear(...) + bias

    Standard operators, for engines that fuse them by themselves. Codes of 2 and 3 bits lie in 4-bit fields; they are
    signed where there are no zero points.
    """

    def __init__(self) -> None:
        self._made: dict[str, Node] = {}

    def match(self, program: Program, node: Node) -> Match | Miss | None:
        source = call_of(node, aten.linear.default)
        weight = call_of(source.args[1], optc.dequantize.default) if source is not None else None
        if weight is None:
            return None
        if None in [program.weight_of(argument) for argument in weight.args[:2]]:
            return Miss(node.name, "codes or scales are computed, not weights")
        return Match(node, {"dequantize": weight})

    def rewrite(self, program: Program, match: Match) -> None:
        node, weight = match.node, match.found["dequantize"]
        codes = program.weight_of(weight.args[0])
        assert codes is not None
        if codes not in self._made:
            self._made[codes] = self._dequantize(program, weight, codes)
        product = insert_call(program, node, aten.matmul.default, (node.args[0], self._made[codes]))
        bias = (*node.args, None)[2]
        if bias is None:
            replace_node(program, node, product)
        else:
            replace_call(program, node, aten.add.Tensor, (product, bias))

    def _dequantize(self, program: Program, weight: Node, name: str) -> Node:
        """The weight [K,N], made of codes that are laid out like it, where the canonical one was."""
        scale, zero = (program.weight_of(item) for item in weight.args[1:3])
        assert scale is not None
        rows, columns = (int(size) for size in value_of(weight).shape)
        bits, group = int(weight.kwargs["bits"]), int(weight.kwargs["group_size"])
        signed, width = zero is None, 8 if bits == 8 else 4

        def stored(tensor: Tensor, offset: int) -> Tensor:
            """Codes or zero points [N, x] as [x, N], two per byte when they have 4 bits."""
            flat = (tensor.t().to(torch.int16) - offset).contiguous()
            if width == 8:
                return flat.to(torch.int8 if signed else torch.uint8)
            return pack_nbits((flat & 15).to(torch.uint8).flatten(), 4)

        base, contract = name.removesuffix("_codes"), program.contract
        offset = 2 ** (bits - 1) if signed else 0
        record_weight(program, f"{base}_packed", contract.sources.get(name, ()), contract.quantization.get(name))
        factors = program.weight(scale).t().contiguous()
        arguments: list[Node | None] = [
            add_weight(program, f"{base}_packed", stored(program.weight(name), offset)),
            add_weight(program, f"{base}_scales", factors if group else factors.flatten()),
            None if zero is None else add_weight(program, f"{base}_zero_points", stored(program.weight(zero), 0)),
        ]
        knobs = {"K": columns, "N": rows, "bits": width, "signed": signed, "block_size": group}
        return insert_call(program, weight, optc.dequantize_linear.default, arguments, knobs)


class IntegerProduct(Rule):
    """linear(dequantize_activation(quantize_dynamic(x, int8)), dequantize(8 bits), bias) -> matmul_integer

    Codes of activations become unsigned (128 is zero): ONNX Runtime multiplies signed ones some hundred times
    slower. Weights stay signed, which its kernel for VNNI and for ARM's dot products takes at full speed; on x86
    without VNNI that kernel saturates 16-bit sums, and only `unsigned` weights, at half the speed, are exact.
    """

    def __init__(self, unsigned: bool) -> None:
        self.unsigned = unsigned
        self._inputs: dict[Node, tuple[Node, Node]] = {}
        self._weights: dict[str, tuple[Node, Node]] = {}

    def match(self, program: Program, node: Node) -> Match | Miss | None:
        site = linear_site(program, node)
        if site is None or site.activations != "int8" or node.target is not aten.linear.default:
            return None
        dynamic = quantized_activation(site.input)
        assert dynamic is not None
        if dynamic.target is not optc.quantize_dynamic.default:
            return Miss(node.name, "its input has static scales: only scales per token are lowered")
        weight = call_of(site.weight, optc.dequantize.default)
        if weight is None or weight.kwargs["bits"] != 8 or weight.args[2] is not None:
            return Miss(node.name, "its weight is not of 8-bit symmetric integers")
        if weight.kwargs["group_size"] not in (0, site.columns):
            return Miss(node.name, "its weight has several scales per channel")
        if None in [program.weight_of(argument) for argument in weight.args[:2]]:
            return Miss(node.name, "codes or scales are computed, not weights")
        if value_of(dynamic.args[0]).dtype is not torch.float32:
            return Miss(node.name, "integer products are lowered for float32 activations only")
        return Match(node, {"site": site, "dynamic": dynamic})

    def rewrite(self, program: Program, match: Match) -> None:
        site: Linear = match.found["site"]
        codes, scale = self._tokens(program, match.found["dynamic"])
        weight, weight_scale = self._weight(program, site)
        arguments = (codes, weight, scale, weight_scale, site.bias)
        replace_call(program, site.node, optc.matmul_integer.default, arguments)

    def _tokens(self, program: Program, dynamic: Node) -> tuple[Node, Node]:
        """Unsigned codes and scales of an input, made once, where its signed ones were."""
        if dynamic not in self._inputs:
            made = insert_call(program, dynamic, optc.quantize_tokens.default, (dynamic.args[0],))
            codes, scale = (insert_call(program, dynamic, operator.getitem, (made, i)) for i in (0, 1))
            self._inputs[dynamic] = (codes, scale)
        return self._inputs[dynamic]

    def _weight(self, program: Program, site: Linear) -> tuple[Node, Node]:
        """The codes as [K,N] and the scales [N], made once per weight."""
        codes, scale = (program.weight_of(item) for item in site.weight.args[:2])
        assert codes is not None
        assert scale is not None
        if codes not in self._weights:
            values = program.weight(codes)
            matrix = values if self.unsigned else (values.to(torch.int16) - MIDDLE).to(torch.int8)
            base, contract = codes.removesuffix("_codes"), program.contract
            entry = contract.quantization.get(codes)
            record_weight(program, f"{base}_packed", contract.sources.get(codes, ()), entry)
            self._weights[codes] = (
                add_weight(program, f"{base}_packed", matrix.t().contiguous()),
                add_weight(program, f"{base}_scales", program.weight(scale).reshape(-1).contiguous()),
            )
        return self._weights[codes]


class CodebookProduct(Rule):
    """linear(x, dequantize_codebook(codes, scale, nf4), bias) -> matmul_bnb4 + bias

    Scales that are themselves quantized become float32: the kernel knows one level of them.
    """

    def __init__(self) -> None:
        self._made: dict[str, tuple[Node, Node]] = {}

    def match(self, program: Program, node: Node) -> Match | Miss | None:
        source = call_of(node, aten.linear.default)
        weight = call_of(source.args[1], optc.dequantize_codebook.default) if source is not None else None
        if weight is None:
            return None
        codes, table = program.weight_of(weight.args[0]), program.weight_of(weight.args[2])
        if codes is None or table is None:
            return Miss(node.name, "codes or table are computed, not weights")
        if weight.kwargs["bits"] != 4 or program.contract.quantization[codes].format != "nf4":
            return Miss(node.name, "MatMulBnb4 has the table of NF4 built in")
        size = int(weight.kwargs["group_size"])
        if size not in GROUPS:
            return Miss(node.name, f"MatMulBnb4 takes blocks of {', '.join(map(str, GROUPS))}, not of {size}")
        return Match(node, {"dequantize": weight})

    def rewrite(self, program: Program, match: Match) -> None:
        node, weight = match.node, match.found["dequantize"]
        codes_node, scale, table = weight.args
        codes = program.weight_of(codes_node)
        assert codes is not None
        if codes not in self._made:
            base, contract = codes.removesuffix("_codes"), program.contract
            entry = contract.quantization[codes]
            record_weight(program, f"{base}_packed", contract.sources.get(codes, ()), entry)
            absmax = _computed(program, scale).detach().flatten().contiguous()
            self._made[codes] = (
                add_weight(program, f"{base}_packed", pack_bnb4(program.weight(codes))),
                add_weight(program, f"{base}_absmax", absmax),
            )
        rows, columns = (int(size) for size in value_of(weight).shape)
        knobs = {"K": columns, "N": rows, "block_size": int(weight.kwargs["group_size"])}
        arguments = (node.args[0], *self._made[codes], table)
        made = insert_call(program, node, optc.matmul_bnb4.default, arguments, knobs)
        bias = (*node.args, None)[2]
        if bias is None:
            replace_node(program, node, made)
        else:
            replace_call(program, node, aten.add.Tensor, (made, bias))


def _computed(program: Program, node: Node) -> Tensor:
    """The value of a weight, or of an expression over weights alone."""
    values = {leaf: program.weight(name) for leaf in leaves(node, lambda _: True) if (name := program.weight_of(leaf))}
    value = evaluate(node, values)
    assert isinstance(value, Tensor)
    return value
