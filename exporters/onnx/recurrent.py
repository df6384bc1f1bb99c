"""Lowerings of recurrent layers: one ONNX node for each layer of a stack."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from torch.fx import Node

from optc.compiler.ir.lazy_weights import materialized
from optc.exporters.onnx.walker import Lowering, Walker

_aten = torch.ops.aten

_ORDERS = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}
"""Gates in ONNX's order, by their place in ATen's: i, f, g, o and r, z, n."""


class _Stack:
    """aten's lstm, gru and rnn: (x, state(s), weights, has_biases, layers, dropout, train, bidirectional, batch_first).

    ONNX's X is [T, B, I], Y [T, directions, B, H], W [directions, gates * H, I], the first state [directions, B, H].
    """

    def __init__(self, walker: Walker, node: Node, kind: str, activation: str) -> None:
        self.walker, self.node, self.kind, self.activation = walker, node, kind, activation
        self.states = list(node.args[1]) if kind == "LSTM" else [node.args[1]]
        self.weights = list(node.args[2])
        self.biases, self.layers = bool(node.args[3]), int(node.args[4])
        self.directions = 2 if node.args[7] else 1
        self.batch_first = bool(node.args[8])

    def run(self) -> tuple[ir.Value, ...]:
        walker, x = self.walker, self.walker.value(self.node.args[0])
        if self.batch_first:
            x = walker.op("Transpose", [x], {"perm": [1, 0, 2]})
        last: list[list[ir.Value]] = [[] for _ in self.states]
        for layer in range(self.layers):
            y, *ends = self._layer(layer, x)
            x = walker.op("Reshape", [walker.op("Transpose", [y], {"perm": [0, 2, 1, 3]}), walker.constant([0, 0, -1])])
            for found, end in zip(last, ends, strict=True):
                found.append(end)
        if self.batch_first:
            x = walker.op("Transpose", [x], {"perm": [1, 0, 2]})
        joined = [ends[0] if len(ends) == 1 else walker.op("Concat", ends, {"axis": 0}) for ends in last]
        return (x, *joined)

    def _layer(self, layer: int, x: ir.Value) -> tuple[ir.Value, ...]:
        walker, count = self.walker, self.directions
        first = layer * count
        hidden = int(self.weights[1].meta["val"].shape[1])
        starts = [
            walker.op("Slice", [walker.value(state), *(walker.constant([i]) for i in (first, first + count, 0))])
            for state in self.states
        ]
        inputs = [x, self._matrix(first, 0), self._matrix(first, 1), self._bias(first), None, *starts]
        attributes: dict[str, Any] = {
            "hidden_size": hidden,
            "direction": "bidirectional" if count == 2 else "forward",
        }
        if self.kind == "GRU":
            attributes["linear_before_reset"] = 1
        if self.kind == "RNN":
            attributes["activations"] = [self.activation] * count
        made: tuple[ir.Value, ...] = walker.op(self.kind, inputs, attributes, outputs=1 + len(starts))
        return made

    def _matrix(self, first: int, place: int) -> ir.Value:
        """W (place 0) or R (1) of a layer, from its directions."""
        return self._made(first, (place,), lambda parts: torch.stack([self._ordered(part) for (part,) in parts]))

    def _bias(self, first: int) -> ir.Value | None:
        """[directions, 2 * gates * H]: of the input, then of the state."""
        if not self.biases:
            return None
        join = lambda parts: torch.stack([torch.cat([self._ordered(item) for item in pair]) for pair in parts])  # noqa: E731
        return self._made(first, (2, 3), join)

    def _made(self, first: int, places: tuple[int, ...], join: Callable[[list[list[Tensor]]], Tensor]) -> ir.Value:
        """An initializer that is made of weights when it is written."""
        program, step = self.walker.program, 4 if self.biases else 2
        names = [
            [program.weight_of(self.weights[(first + side) * step + place]) for place in places]
            for side in range(self.directions)
        ]

        def compute() -> Tensor:
            return join([[materialized(program.weight(str(name)).detach()) for name in row] for row in names])

        with torch.device("meta"):
            shape = join([[torch.empty(program.weight(str(name)).shape) for name in row] for row in names]).shape
        dtype = program.weight(str(names[0][0])).dtype
        return self.walker.computed(f"{names[0][0]}.onnx", compute, dtype, shape)

    def _ordered(self, part: Tensor) -> Tensor:
        """A weight [gates * H, ...] with its gates in ONNX's order."""
        order = _ORDERS[self.kind]
        return torch.cat([part.chunk(len(order))[place] for place in order])


def _recurrent(kind: str, activation: str = "") -> Lowering:
    return lambda walker, node: _Stack(walker, node, kind, activation).run()


def plain_recurrence(node: Node) -> str | None:
    """A predicate: weights as they are stored, a batch axis, no dropout, no projection of the state."""
    x, weights, step = node.args[0], node.args[2], 4 if node.args[3] else 2
    if node.args[6] and node.args[5]:
        return "dropout is active (training mode)"
    if any(item.op != "placeholder" for item in weights):
        return "computed weights are not lowered"
    if len(weights) != step * node.args[4] * (2 if node.args[7] else 1):
        return "a projection of the state (proj_size) is not lowered"
    return None if x.meta["val"].dim() == 3 else "an input without batch axis is not lowered"


TABLE: dict[Any, Lowering] = {
    _aten.lstm.input: _recurrent("LSTM"),
    _aten.gru.input: _recurrent("GRU"),
    _aten.rnn_tanh.input: _recurrent("RNN", "Tanh"),
    _aten.rnn_relu.input: _recurrent("RNN", "Relu"),
}
