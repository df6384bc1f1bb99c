"""Linears of a graph: calls that multiply activations with a weight, however they are spelled."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from optc.compiler.analysis.dataflow import aten, pointwise_source, value_of
from optc.compiler.ir.program import Program
from optc.compiler.ops import library
from optc.compiler.ops.library import makes_weight

LINEARS = (aten.linear.default, aten.addmm.default, aten.mm.default, aten.matmul.default)


@dataclass(frozen=True)
class Linear:
    """A call that multiplies activations with a weight.

    Attributes:
        node: `aten.linear`, `aten.addmm` or a matrix product with a weight on the right.
        input: activations [..., K].
        weight: the node in the weight's place, [N, K], or [K, N] when `transposed`.
        bias: [N] or None.
        placeholder: the weight itself, or None when it is computed (dequantized, for one).
        index: the expert e when the weight is `select(placeholder, 0, e)` of a stacked [E, N, K].
    """

    node: Node
    input: Node
    weight: Node
    bias: Node | None
    transposed: bool
    placeholder: Node | None
    index: int | None = None

    @property
    def columns(self) -> int:
        """K, the length of the sums."""
        return int(value_of(self.weight).shape[0 if self.transposed else 1])

    @property
    def rows(self) -> int:
        """N, how many sums there are."""
        return int(value_of(self.weight).shape[1 if self.transposed else 0])

    @property
    def activations(self) -> str:
        """How the input is quantized ("int8", "fp8", "nvfp4"), "" when it is not."""
        call = quantized_activation(self.input)
        return activation_format(call) if call is not None else ""


def linear_site(program: Program, node: Node) -> Linear | None:
    """`node` as a Linear, or None when it is none: both factors are activations, or the scales are not 1."""
    if node.op != "call_function" or node.target not in LINEARS:
        return None
    if node.target is aten.linear.default:
        x, weight, bias, transposed = node.args[0], node.args[1], (*node.args, None)[2], False
    elif node.target is aten.addmm.default:
        (bias, x, weight), transposed = node.args[:3], True
        if node.kwargs or not isinstance(bias, Node) or value_of(bias).dim() != 1:
            return None
    else:
        x, weight, bias, transposed = node.args[0], node.args[1], None, True
    assert isinstance(x, Node)
    assert isinstance(weight, Node)
    assert bias is None or isinstance(bias, Node)
    if value_of(weight).dim() != 2:
        return None
    root: Any = weight
    index: int | None = None
    if root.target is aten.select.int and root.args[1] == 0 and isinstance(root.args[2], int):
        root, index = root.args[0], root.args[2]
    held = root if program.weight_of(root) is not None else None
    if held is None and not makes_weight(weight.target):
        return None
    return Linear(node, x, weight, bias, transposed, held, index)


def quantized_activation(node: Node) -> Node | None:
    """The call that made the codes behind a dequantized activation, None when `node` is none."""
    spec = library.find(node.target)
    if spec is None or not spec.makes_activation:
        return None
    codes = node.args[0]
    assert isinstance(codes, Node)
    made = codes.args[0] if codes.target is operator.getitem else codes
    assert isinstance(made, Node)
    source = library.find(made.target)
    return made if source is not None and source.activation_codes is not None else None


def brought_back(call: Node) -> list[Node]:
    """The dequantized activations of the codes that a call made."""
    codes = [call, *(user for user in call.users if user.target is operator.getitem)]
    users = dict.fromkeys(user for item in codes for user in item.users)
    return [user for user in users if quantized_activation(user) is call]


def activation_format(call: Node) -> str:
    """The format that a call which makes codes of activations rounds to."""
    spec = library.find(call.target)
    assert spec is not None
    assert spec.activation_codes is not None
    return spec.activation_codes(call.kwargs)


def weight_calls(program: Program) -> list[Node]:
    """The calls that make a weight of codes, in graph order."""
    return [node for node in program.graph.nodes if makes_weight(node.target)]


def linear_sites(program: Program) -> Iterator[Linear]:
    """Every Linear of a program, in graph order."""
    for node in program.graph.nodes:
        site = linear_site(program, node)
        if site is not None:
            yield site


def head_linear(program: Program) -> Node | None:
    """The linear whose result is the model's output, after pointwise calls at most, or None."""
    roles = ("logits", "classes", "hidden")
    index = next((i for i, spec in enumerate(program.contract.outputs) if spec.role in roles), None)
    if index is None:
        return None
    output = program.graph.output_node()
    node: Node | None = output.args[0][index]
    while node is not None and node.target not in LINEARS:
        node = pointwise_source(program, node)
    return node


def chooses_experts(program: Program, node: Node) -> bool:
    """Whether a node's result decides a top-k, after pointwise calls at most: a router's logits do."""
    pending = [node]
    while pending:
        current = pending.pop()
        for user in current.users:
            if user.target is aten.topk.default:
                return True
            if pointwise_source(program, user) is current:
                pending.append(user)
    return False
