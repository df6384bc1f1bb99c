"""A program's graph as a differentiable function of some of its weights.

Operators of the dialect have no backward of their own; their references and decompositions are plain ATen, which has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from optc.compiler.ir.asserts import is_assert
from optc.compiler.ir.program import Program
from optc.compiler.ops.library import find
from optc.passes.quantization.arithmetic.stream import plain_attention, token_inputs


class Differentiable:
    """Runs a program without a KV cache on token batches, with gradients.

    Args:
        weights: by name, in place of the program's.
    """

    def __init__(self, program: Program, weights: Mapping[str, Tensor] | None = None) -> None:
        self.program = program
        self.weights = dict(weights or {})
        self._names = program.weight_names()
        self._device = next((weight.device for _, weight in program.weights()), torch.device("cpu"))
        self._output = program.graph.output_node()
        index = next(i for i, spec in enumerate(program.contract.outputs) if spec.role == "logits")
        self._logits: Node = self._output.args[0][index]
        nodes = [node for node in program.graph.nodes if node.op == "call_function"]
        self._nodes = [node for node in nodes if not is_assert(node.target)]
        places = {node: place for place, node in enumerate(self._nodes)}
        self._dead: dict[int, list[Node]] = {}
        for node in program.graph.nodes:
            last = max((places[user] for user in node.users if user in places), default=None)
            if last is not None and self._output not in node.users:
                self._dead.setdefault(last, []).append(node)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits [B, S, V] of tokens [B, S]."""
        values: dict[Node, Any] = token_inputs(self.program, tokens.to(self._device))
        for node in self.program.graph.nodes:
            if node.op == "placeholder" and node not in values:
                name = self._names[node.name]
                values[node] = self.weights.get(name, self.program.weight(name).detach())
        for place, node in enumerate(self._nodes):
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = _call(node.target, args, kwargs)
            for dead in self._dead.get(place, ()):
                values.pop(dead, None)
        result = values[self._logits]
        assert isinstance(result, Tensor)
        return result


def _call(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if target is torch.ops.optc.attention.default and (fused := plain_attention(args, kwargs)) is not None:
        return fused
    spec = find(target)
    return (target if spec is None else spec.aten or spec.reference)(*args, **kwargs)
