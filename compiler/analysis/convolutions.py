"""Convolutions of a graph with a weight, however they are spelled, and what may stand behind them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from optc.compiler.analysis.dataflow import aten, value_of
from optc.compiler.ir.program import Program

CONVOLUTIONS = (
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
    aten.convolution.default,
)
TRANSPOSED = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)


@dataclass(frozen=True)
class Convolution:
    """A call that convolves an activation with a weight; none that is transposed.

    Attributes:
        node: the call.
        input: activations [B, I, ...].
        weight: the placeholder of the weight [O, I / groups, ...].
        bias: the placeholder of the bias [O], or None.
    """

    node: Node
    input: Node
    weight: Node
    bias: Node | None

    @property
    def channels(self) -> int:
        """O, the output channels."""
        return int(value_of(self.weight).shape[0])


def convolution_site(program: Program, node: Node) -> Convolution | None:
    """`node` as a Convolution, or None when it is none: it is transposed, has no batch axis, or its weight is computed."""
    if node.op != "call_function" or node.target not in CONVOLUTIONS:
        return None
    x, weight, bias = (*node.args, None)[:3]
    if node.target is aten.convolution.default and node.args[6]:
        return None
    held = [item for item in (weight, bias) if item is not None]
    if any(not isinstance(item, Node) or program.weight_of(item) is None for item in held):
        return None
    assert isinstance(x, Node)
    assert isinstance(weight, Node)
    if value_of(x).dim() != value_of(weight).dim():
        return None
    return Convolution(node, x, weight, bias)


def unpadded(node: Node) -> Node:
    """The node whose values are surrounded by zeros here; the node itself where it is no such padding."""
    if node.target not in (aten.pad.default, aten.constant_pad_nd.default):
        return node
    general = node.target is aten.pad.default
    mode = _argument(node, 2, "mode", "constant") if general else "constant"
    amounts = node.args[1]
    assert isinstance(amounts, list | tuple)
    zeros = mode == "constant" and not _argument(node, 3 if general else 2, "value", None)
    source = node.args[0]
    assert isinstance(source, Node)
    return source if zeros and all(isinstance(item, int) and item >= 0 for item in amounts) else node


def clipped_at_zero(node: Node) -> float | None:
    """The upper bound (infinite for relu) where a node is max(x, 0) or min(max(x, 0), bound) of its first argument."""
    if node.target is aten.relu.default:
        return torch.inf
    if node.target is aten.relu6.default:
        return 6.0
    if node.target not in _CLAMPS or len(node.all_input_nodes) != 1:
        return None
    names, (low, high) = _CLAMPS[node.target]
    low, high = (
        _argument(node, 1 + place, name, default)
        for place, (name, default) in enumerate(zip(names, (low, high), strict=True))
    )
    if low != 0:
        return None
    return torch.inf if high is None else float(high)


_CLAMPS: dict[Any, tuple[tuple[str, str], tuple[Any, Any]]] = {
    aten.clamp.default: (("min", "max"), (None, None)),
    aten.clamp_min.default: (("min", "max"), (None, None)),
    aten.hardtanh.default: (("min_val", "max_val"), (-1.0, 1.0)),
}


def _argument(node: Node, place: int, name: str, default: Any) -> Any:
    """An argument by position or keyword."""
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)
