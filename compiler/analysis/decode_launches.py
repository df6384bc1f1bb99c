"""What a decode step of a paged program launches: calls that compute, between one attention and the next a layer's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from optc.compiler.ir.program import Program
from optc.compiler.ir.surgery import fake_mode
from optc.compiler.ops.library import attends


@dataclass(frozen=True)
class DecodeLaunches:
    """The calls of a decode step that are not views, in graph order.

    Attributes:
        step: all of them.
        layer: those from one attention up to the next, where that are most: as many as a layer has. All of them where
            there is one attention or none.
    """

    step: tuple[Node, ...]
    layer: tuple[Node, ...]

    def counts(self) -> Counter[str]:
        """Calls of a layer by operator."""
        return Counter(_name(node) for node in self.layer)

    def __str__(self) -> str:
        listed = ", ".join(f"{count} {name}" for name, count in self.counts().most_common())
        return f"a decode step of one token computes {len(self.step)} calls, {len(self.layer)} in a layer: {listed}"


def decode_launches(program: Program) -> DecodeLaunches:
    """Run the shapes of a step of one token through a paged program, and see which results are new memory.

    A call of the dialect counts as one; calls of ATen may be more than one kernel each.
    """
    step = tuple(_computing(program))
    places = [i for i, node in enumerate(step) if attends(node.target)]
    layers = [step[first:last] for first, last in pairwise(places)]
    return DecodeLaunches(step, max(layers, key=len, default=step))


def _computing(program: Program) -> Iterator[Node]:
    inputs = dict(zip(program.user_inputs(), program.contract.inputs, strict=True))
    values: dict[Node, Any] = {}
    with fake_mode(program):
        for node in program.graph.nodes:
            if node in inputs:
                sizes = [_size(size) for size in inputs[node].dims]
                value = node.meta["val"]
                values[node] = torch.empty(sizes, dtype=value.dtype, device=value.device)
            elif node.op == "placeholder":
                values[node] = node.meta["val"]
            elif node.op == "call_function":
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                values[node] = node.target(*args, **kwargs)
                if _computes(node, values):
                    yield node


def _size(size: int | str) -> int:
    """Of an axis in a step of one token: one of everything, and the two bounds of one request."""
    return size if isinstance(size, int) else 2 if size == "requests_plus_1" else 1


def _computes(node: Node, values: dict[Node, Any]) -> bool:
    """Whether a call writes memory: its own, or an argument's."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:  # getitem, arithmetic of sizes
        return False
    given = {item.untyped_storage()._cdata for source in node.all_input_nodes for item in _tensors(values[source])}
    made = _tensors(values[node])
    return schema.is_mutable or any(item.untyped_storage()._cdata not in given for item in made)


def _tensors(value: Any) -> list[Tensor]:
    items = value if isinstance(value, list | tuple) else [value]
    return [item for item in items if isinstance(item, Tensor)]


def _name(node: Node) -> str:
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    return f"{target.namespace}.{target._schema.name.partition('::')[2]}"
